#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster. Call it on a login node, in a checkout that all nodes see.
#
#   ./launch/slurm.sh --nodes 4 --gpus 8 [OPTIONS] STAGE CONFIG [--field value ...]
#
#   --nodes N, --gpus N   nodes, and GPUs of each; one process drives all GPUs of a node
#   --cpus N              cores of a node to use (default: 8 for each GPU)
#   --time T              limit, as sbatch takes it (default: 24:00:00)
#   --partition P, --account A, --qos Q
#                         as sbatch takes them
#   --sbatch LINE         any other option of sbatch, such as --sbatch --constraint=h200
#   --dry-run             print the batch script and stop
#   --smoke               three steps, save, restore, exit
#
# Five minutes before the limit, or when SLURM preempts it, the run saves and exits with 75; the job then queues itself
# again and goes on from there. The virtual environment is made here, once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

takes=(nodes gpus cpus time partition account qos sbatch)
parse_common "$@"
need nodes && need gpus && number nodes && number gpus
: "${own[cpus]:=$((8 * ${own[gpus]}))}" "${own[time]:=24:00:00}"
number cpus
command[0]="$venv/bin/unichar"

script() {
  local name
  cat <<END
#!/bin/bash
#SBATCH --job-name=unichar-${command[1]}
#SBATCH --nodes=${own[nodes]}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=${own[gpus]}
#SBATCH --cpus-per-task=${own[cpus]}
#SBATCH --time=${own[time]}
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
END
  for name in partition account qos; do
    [ -z "${own[$name]:-}" ] || echo "#SBATCH --$name=${own[$name]}"
  done
  [ -z "${own[sbatch]:-}" ] || echo "#SBATCH ${own[sbatch]}"
  cat <<END

cd $(quoted "$repository")
srun --cpus-per-task=${own[cpus]} --kill-on-bad-exit=1 $(quoted "${command[@]}" --hosts.cluster slurm)
code=\$?
if [ "\$code" -eq 75 ]; then # saved on a signal: go on when there is room
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
}

if [ -n "$dry_run" ]; then
  script
  exit 0
fi
prepare_environment cuda tensorboard
script | sbatch
