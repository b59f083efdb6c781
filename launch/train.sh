#!/usr/bin/env bash
# Trains on this machine, with all of its devices; sets up what it needs.
#
#   ./launch/train.sh [OPTIONS] STAGE CONFIG [--field value ...]
#
#   STAGE       sft or grpo
#   CONFIG      a name of configs/ or a .toml file; its fields are options after it
#   --dry-run   print the exact command and stop
#   --smoke     three steps, save, restore, exit: the first minute on a new machine
#   --extra X   what JAX is installed for: cuda, tpu or cpu (default: what this machine has)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

takes=(extra)
parse_common "$@"

extra="${own[extra]:-}"
if [ -z "$extra" ]; then
  extra=cpu
  if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then extra=tpu; fi
  if command -v nvidia-smi >/dev/null 2>&1; then extra=cuda; fi
fi
case "$extra" in
  cuda | tpu) extras=("$extra" tensorboard gcs) ;;
  cpu) extras=(tensorboard) ;;
  *) fail "--extra $extra: expected cuda, tpu or cpu" ;;
esac

if [ -n "$dry_run" ]; then
  echo "prepare_environment $(quoted "${extras[@]}")"
  quoted "${command[@]}"
  exit 0
fi
prepare_environment "${extras[@]}"
exec "${command[@]}"
