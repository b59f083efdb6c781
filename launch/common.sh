# Sourced by the launchers: their common options, and how a command is printed.
#   parse_common "$@"   sets dry_run, smoke, own (options of the launcher, by name) and command (STAGE CONFIG ...)
# A launcher names its own options, which take a value each, in the array `takes`.

parse_common() {
  dry_run="" smoke=""
  declare -gA own=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) dry_run=yes ;;
      --smoke) smoke=--smoke ;;
      -h | --help) explain; exit 0 ;;
      --*)
        if [[ " ${takes[*]-} " != *" ${1#--} "* ]]; then
          fail "option $1 is unknown; options of the experiment come after STAGE CONFIG"
        elif [ $# -lt 2 ]; then
          fail "$1: a value is missing"
        fi
        own["${1#--}"]="$2"
        shift
        ;;
      *) break ;;
    esac
    shift
  done
  case "${1:-}" in
    sft | grpo) ;;
    "") fail "what to run? Expected: sft CONFIG or grpo CONFIG" ;;
    *) fail "'$1': expected sft or grpo" ;;
  esac
  [ $# -ge 2 ] || fail "which experiment? Expected: $1 CONFIG, a file or a name of configs/"
  command=(unichar "$@")
  [ -n "$smoke" ] && command+=(--smoke)
  return 0
}

# The comment at the head of the launcher.
explain() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

fail() {
  echo "$(basename "$0"): $1. Try $0 --help" >&2
  exit 2
}

need() { [ -n "${own[$1]:-}" ] || fail "--$1 is missing"; }

number() { [[ "${own[$1]}" =~ ^[1-9][0-9]*$ ]] || fail "--$1 ${own[$1]}: expected a positive number"; }

# Words as a shell reads them back; plain words stay plain.
quoted() {
  local word out=""
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=" $word"; else out+=" $(printf '%q' "$word")"; fi
  done
  echo "${out# }"
}
