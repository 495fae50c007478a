# What the shell scripts here share. Sourced, never run.
#
# Kept to bash 3.2, which macOS ships: no associative arrays, and an array that may be empty is expanded
# as ${a[@]+"${a[@]}"}.

SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(cd "$SCRIPTS/../.." && pwd)"

say() { printf '[pretrain], %s\n' "$1"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# default NAME VALUE: sets NAME where the environment does not.
default() {
    [[ -n "${!1:-}" ]] || printf -v "$1" '%s' "$2"
}

# whole NAME LEAST: refuses a value of NAME that is not a whole number of at least LEAST.
whole() {
    [[ "${!1}" =~ ^(0|[1-9][0-9]{0,14})$ ]] && ((${!1} >= $2)) \
        || fail "$1=${!1}: must be a whole number of at least $2"
}

one_of() {
    local name="$1" allowed; shift
    for allowed in "$@"; do [[ "${!name}" != "$allowed" ]] || return 0; done
    fail "$name=${!name}: must be one of: $*"
}

# The Python of the active environment, or of the repository's own.
find_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -z "${PYTHON:-}" ]]; then
        if [[ -n "$active" ]]; then PYTHON="$active/bin/python"
        elif [[ -x "$ROOT/.venv/bin/python" ]]; then PYTHON="$ROOT/.venv/bin/python"
        else PYTHON=python3
        fi
    fi
    PYTHON="$(command -v "$PYTHON")" \
        || fail "no Python found; bash neo/scripts/setup_env.sh makes an environment"
}

# quoted WORD...: one line that a shell reads back as the same words.
quoted() {
    local word line=""
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || printf -v word '%q' "$word"
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}
