#!/usr/bin/env bash
# Customises a character on this machine: sets up everything, trains, evaluates, and writes a report to open.
#   ./launch/quickstart.sh                     a character that ships with the mini model
#   ./launch/quickstart.sh --data FOLDER       a character folder in the RoleScape-20 layout
# All options: ./launch/quickstart.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment serve
export UNICHAR_COMMAND="${venv#"$PWD"/}/bin/unichar" # what printed commands begin with: the environment is not on the PATH
exec unichar quickstart "$@"
