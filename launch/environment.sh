# Sourced by the other scripts: makes .venv in the repository (once) and installs the package into it.
#   prepare_environment [EXTRA ...]     e.g. prepare_environment test torch
# UNICHAR_VENV: another place for the environment.  PYTHON: the interpreter to start from (3.11 or newer).

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${UNICHAR_VENV:-$repository/.venv}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
      && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "UniChar-JAX needs Python 3.11 or newer; none was found. Install it, or name one: PYTHON=/path/to/python $0" >&2
  return 1
}

prepare_environment() {
  local extras="" spec="$repository" stamp wanted
  [ $# -gt 0 ] && extras="$(IFS=,; echo "$*")" && spec="$repository[$extras]"
  if [ ! -x "$venv/bin/python" ]; then
    local python
    python="$(find_python)" || return 1
    echo "Making a virtual environment in ${venv#"$repository"/} ..." >&2
    "$python" -m venv "$venv" || return 1
  fi
  # The stamp names what was installed, so that a second start takes no time.
  stamp="$venv/.unichar-$(echo "${extras:-base}" | tr ',' '-')"
  wanted="$(cat "$repository/pyproject.toml" "$repository/constraints.txt" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing UniChar-JAX${extras:+ with $extras} (a few minutes the first time) ..." >&2
    if [[ ",$extras," == *,torch,* ]]; then install_torch || return 1; fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$repository/constraints.txt" --editable "$spec" || return 1
    echo "$wanted" > "$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}

# PyTorch is for comparisons only, and its CPU build is enough; asked for exactly, so that no GPU build comes along.
install_torch() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
}
