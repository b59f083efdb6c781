#!/usr/bin/env bash
# Formatting, lint, types and tests; sets up everything it needs.
#   ./launch/test.sh            the default run, under fifteen minutes on two cores
#   ./launch/test.sh --all      with the slow tests and the comparisons with PyTorch
#   ./launch/test.sh ARGS ...   passed on to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"

marks="not slow and not torch" extras=(test gpu-compiler)
if [ "${1:-}" = "--all" ]; then
  shift
  marks="" extras=(test gpu-compiler torch)
fi
prepare_environment "${extras[@]}"

ruff format --check .
ruff check .
mypy
# Two workers: compiling takes most of the time and uses one core.
exec python -m pytest --numprocesses "${UNICHAR_TEST_WORKERS:-2}" --dist loadfile ${marks:+-m "$marks"} "$@"
