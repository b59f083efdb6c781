"""The launchers: what they would run, read back by a parser of each format. Nothing is installed or submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from unichar_jax.cli.train import parse_start
from unichar_jax.config.train import SFTConfig

LAUNCH = Path(__file__).parents[2] / "launch"
STAGE = ("sft", "sft-bagel-7b", "--run-dir", "gs://bucket/a run", "--steps", "7")
GKE = ("--name", "mira", "--image", "registry/unichar:1", "--topology")


def _run(script: str, *words: str, code: int = 0) -> str:
    done = subprocess.run([LAUNCH / script, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def _start(words: list[str]):
    """The start that a printed command is, by the command's own parser."""
    assert Path(words[0]).name == "unichar" and words[1] == "sft"
    return parse_start(SFTConfig, words[2:], "sft")


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", ["train.sh", "slurm.sh", "tpu_vm.sh", "gke.sh"])
def test_help_and_mistakes(script):
    told = _run(script, "--help")
    assert all(option in told for option in ("--dry-run", "--smoke", "STAGE CONFIG", f"./launch/{script}"))
    assert not any(line.startswith("#") for line in told.splitlines())
    assert "option --stepz is unknown" in _run(script, "--stepz", "3", *STAGE, code=2)
    assert "expected sft or grpo" in _run(script, "train", code=2)
    assert "which experiment?" in _run(script, "sft", code=2)


def test_single_host():
    prepare, command = _run("train.sh", "--dry-run", "--smoke", "--extra", "tpu", *STAGE).splitlines()
    assert prepare == "prepare_environment tpu tensorboard gcs"
    start = _start(shlex.split(command))
    assert start.smoke and start.hosts.cluster == "auto"
    assert (start.experiment.run_dir, start.experiment.steps) == ("gs://bucket/a run", 7)
    assert "expected cuda, tpu or cpu" in _run("train.sh", "--extra", "rocm", *STAGE, code=2)


def test_slurm():
    options = ("--nodes", "4", "--gpus", "8", "--partition", "big", "--sbatch", "--constraint=h200")
    script = _run("slurm.sh", "--dry-run", *options, *STAGE)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives  # sbatch reads none after the first command
    parsed = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in directives)
    assert (parsed["nodes"], parsed["ntasks-per-node"], parsed["gpus-per-node"]) == ("4", "1", "8")
    assert (parsed["cpus-per-task"], parsed["signal"], parsed["partition"]) == ("64", "TERM@300", "big")
    assert parsed["constraint"] == "h200" and "requeue" in parsed and parsed["open-mode"] == "append"
    command = next(shlex.split(line) for line in lines if line.startswith("srun"))
    start = _start(command[next(i for i, w in enumerate(command) if w.endswith("/unichar")) :])
    assert start.hosts.cluster == "slurm" and start.experiment.steps == 7
    assert "--nodes is missing" in _run("slurm.sh", "--gpus", "8", *STAGE, code=2)
    assert "expected a positive number" in _run("slurm.sh", "--gpus", "8", "--nodes", "x", *STAGE, code=2)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, False), (0, False)])
def test_slurm_goes_on_after_a_preemption_only(tmp_path, code, requeued):
    script = _run("slurm.sh", "--dry-run", "--nodes", "1", "--gpus", "1", *STAGE)
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash"], input=script, text=True, env=environ)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_tpu_vm():
    options = ("--name", "pod", "--zone", "us-east5-b", "--project", "mine")
    pack, copy, start = map(shlex.split, _run("tpu_vm.sh", "--dry-run", *options, *STAGE).splitlines())
    assert pack[0] == "git" and "archive" in pack
    for command in (copy, start):
        assert command[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert command[command.index("--worker") + 1] == "all"
        assert command[command.index("--zone") + 1] == "us-east5-b"
    assert copy[5] == pack[pack.index("--output") + 1]
    remote = start[start.index("--command") + 1]
    subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
    words = shlex.split(remote[remote.index("nohup") : remote.index(">")])
    assert words[:4] == ["nohup", "./launch/train.sh", "--extra", "tpu"]
    parsed = _start(["unichar", *words[4:]])
    assert parsed.hosts.cluster == "tpu" and parsed.experiment.run_dir == "gs://bucket/a run"


@pytest.mark.parametrize(
    ("topology", "hosts", "resource", "selector"),
    [
        ("v5e:8x8", 16, {"google.com/tpu": 4}, ("gke-tpu-topology", "8x8")),
        ("v5p:2x2x2", 2, {"google.com/tpu": 4}, ("gke-tpu-accelerator", "tpu-v5p-slice")),
        ("h200:1x4x8", 4, {"nvidia.com/gpu": 8}, ("gke-accelerator", "nvidia-h200-141gb")),
    ],
)
def test_gke(topology, hosts, resource, selector):
    manifest = yaml.safe_load(_run("gke.sh", *GKE, topology, "--account", "trainer", "--dry-run", *STAGE))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "mira"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 20
    (group,) = manifest["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"][f"cloud.google.com/{selector[0]}"] == selector[1]
    (container,) = pod["containers"]
    assert container["image"] == "registry/unichar:1"
    assert container["resources"]["limits"] == resource
    environ = {e["name"]: e for e in container["env"]}
    # <jobset>-<group>-<job>-<pod>.<jobset> is the name that JobSet's headless service gives the first pod.
    assert environ["UNICHAR_COORDINATOR"]["value"] == f"mira-{group['name']}-0-0.mira:8476"
    assert environ["UNICHAR_NUM_PROCESSES"]["value"] == str(hosts)
    index = environ["UNICHAR_PROCESS_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert {p["containerPort"] for p in container["ports"]} == {8476, 8477}
    volumes = {v["name"] for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} <= volumes
    start = _start(["unichar", *container["args"]])
    assert start.hosts.cluster == "flags" and start.experiment.run_dir == "gs://bucket/a run"


def test_gke_smoke_is_not_started_again():
    manifest = yaml.safe_load(_run("gke.sh", *GKE, "v6e:4x4", "--dry-run", "--smoke", *STAGE))
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
    (group,) = manifest["spec"]["replicatedJobs"]
    assert "--smoke" in group["template"]["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3", "expected chip:AxB"),
        ("v5e:axb", "expected chip:AxB"),
        ("v9:2x2", "expected v5e, v5p"),
        ("v5e:1x3", "--chips 4 does not divide the 3 chips"),
    ],
)
def test_gke_refuses_topologies_that_are_none(topology, message):
    assert message in _run("gke.sh", *GKE, topology, "--dry-run", *STAGE, code=2)


def test_the_image_has_what_it_copies():
    root, lines = LAUNCH.parent, (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "unichar_jax", "configs", "checkpoints"} <= set(copied)
    assert all((root / name).exists() for name in copied)
    ignored = (root / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)
    assert lines[-1] == 'ENTRYPOINT ["unichar"]'


def test_quickstart_says_how_it_was_started(tmp_path):
    """What it prints begins with a path that runs from where the user stands, and serve's packages are there."""
    venv, repository = tmp_path / "a venv", LAUNCH.parent
    (venv / "bin").mkdir(parents=True)
    for name, body in (("python", "exit 1"), ("unichar", 'echo "$UNICHAR_COMMAND"')):
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (venv / "bin" / name).chmod(0o755)
    files = [(repository / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    stamp = subprocess.run(["cksum"], input=b"".join(files), capture_output=True, check=True).stdout
    (venv / ".unichar-serve").write_bytes(
        stamp
    )  # installed with the extra of that name: nothing is left to do
    for stands, printed in ((tmp_path, "a venv/bin/unichar"), (repository, str(venv / "bin" / "unichar"))):
        done = subprocess.run(
            [LAUNCH / "quickstart.sh"],
            cwd=stands,
            env=os.environ | {"UNICHAR_VENV": str(venv)},
            capture_output=True,
            text=True,
        )
        assert (done.stdout.strip(), done.returncode) == (printed, 0), done.stderr
        assert os.access(stands / printed, os.X_OK)
