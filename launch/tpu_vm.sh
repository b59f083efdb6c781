#!/usr/bin/env bash
# Trains on a TPU VM, one host or a whole pod slice. Call it where gcloud is set up.
#
#   ./launch/tpu_vm.sh --name my-pod --zone us-central2-b [OPTIONS] STAGE CONFIG [--field value ...]
#
#   --name N, --zone Z   the TPU VM, which exists already
#   --project P          its project (default: gcloud's)
#   --dry-run            print the exact commands and stop
#   --smoke              three steps, save, restore, exit
#
# The committed files of this checkout (git HEAD) are copied to every host. The hosts share no disk, so give gs:// paths:
# --run-dir gs://bucket/run --base gs://bucket/model --data.path gs://bucket/data. The run goes on if the connection
# breaks; its output is in unichar-jax/train.log on every host.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

takes=(name zone project)
parse_common "$@"
need name && need zone

archive="${TMPDIR:-/tmp}/unichar-jax.tar.gz"
where=(--zone "${own[zone]}" --worker all)
[ -z "${own[project]:-}" ] || where+=(--project "${own[project]}")

train="$(quoted ./launch/train.sh --extra tpu "${command[@]:1}" --hosts.cluster tpu)"
remote="mkdir -p unichar-jax && tar -xzf unichar-jax.tar.gz -C unichar-jax && cd unichar-jax || exit 1"
remote+="; nohup $train > train.log 2>&1 & pid=\$!; tail --pid \$pid -n +1 -f train.log; wait \$pid"

pack=(git -C "$repository" archive --format tar.gz --output "$archive" HEAD)
copy=(gcloud compute tpus tpu-vm scp "$archive" "${own[name]}:unichar-jax.tar.gz" "${where[@]}")
start=(gcloud compute tpus tpu-vm ssh "${own[name]}" "${where[@]}" --command "$remote")

if [ -n "$dry_run" ]; then
  quoted "${pack[@]}"
  quoted "${copy[@]}"
  quoted "${start[@]}"
  exit 0
fi
"${pack[@]}"
"${copy[@]}"
"${start[@]}"
