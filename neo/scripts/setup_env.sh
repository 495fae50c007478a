#!/usr/bin/env bash
# The Python environment that every command of this repository runs in.
#
#   bash neo/scripts/setup_env.sh        make it, or bring it up to date
#   source neo/scripts/setup_env.sh      the same for a script, which then calls `setup_env`
#
# The active environment (VIRTUAL_ENV or CONDA_PREFIX) is used where there is one; otherwise .venv in
# the repository's root is made. An installed torch is never replaced. A second call takes no time:
# a stamp in the environment holds the hash of what it was made from.
#
# Settings: NEO_PYTHON, the Python to make .venv with; NEO_SETUP_LOG, where pip's output goes.

REPOSITORY_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CPU_TORCH="torch==2.13.0"      # where neither torch nor a GPU is found
GPU_TORCH="torch>=2.11"        # where a GPU is found: the build that suits its driver is pip's choice

# setup_env: leaves PYTHON (a path), VIRTUAL_ENV and a PATH that finds the environment's commands first.
setup_env() {
    find_environment || return 2
    export VIRTUAL_ENV="$NEO_ENVIRONMENT" PATH="$NEO_ENVIRONMENT/bin:$PATH"
    local stamp="$NEO_ENVIRONMENT/.neo-setup" wanted
    wanted="$(environment_hash)" || return 2
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && installed_from_here; then
        echo "environment: $NEO_ENVIRONMENT (up to date)"
        return 0
    fi
    install_packages || return 1
    echo "$wanted" > "$stamp"
}

# Sets NEO_ENVIRONMENT and PYTHON.
find_environment() {
    NEO_ENVIRONMENT="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -z "$NEO_ENVIRONMENT" ]]; then
        NEO_ENVIRONMENT="$REPOSITORY_ROOT/.venv"
        [[ -x "$NEO_ENVIRONMENT/bin/python" ]] || make_environment || return
    fi
    PYTHON="$NEO_ENVIRONMENT/bin/python"
    export PYTHON
    if ! suitable_python "$PYTHON"; then
        echo "error: the environment $NEO_ENVIRONMENT has $("$PYTHON" --version 2>&1 || true)," \
             "NEO needs Python 3.10, 3.11 or 3.12: deactivate it, and .venv is made instead," \
             "or activate another" >&2
        return 2
    fi
    if [[ "$(torch_of "$PYTHON")" == old* ]]; then
        echo "error: the environment $NEO_ENVIRONMENT has torch $(torch_of "$PYTHON" | cut -c5-)," \
             "NEO needs 2.11 or newer and never replaces an installed one: upgrade it yourself," \
             "or deactivate the environment, and .venv is made instead" >&2
        return 2
    fi
}

# suitable_python PYTHON: true if it runs and is of a version that NEO supports.
suitable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# is_an_environments PYTHON: true for the Python of a virtual environment.
is_an_environments() {
    "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'
}

# torch_of PYTHON: "none", "old VERSION" or "fit VERSION".
torch_of() {
    "$1" - <<'PYTHON_CODE'
from importlib.metadata import PackageNotFoundError, version
try:
    torch = version("torch")
    major, minor = torch.split(".")[:2]
    print("fit" if (int(major), int(minor)) >= (2, 11) else "old", torch)
except PackageNotFoundError:
    print("none")
PYTHON_CODE
}

make_environment() {
    local candidate base="" visible=""
    for candidate in ${NEO_PYTHON:-python3 python python3.11 python3.12 python3.10}; do
        suitable_python "$candidate" || continue
        [[ -n "$base" ]] || base="$candidate"
        # A torch that came with the machine stays in use: the environment sees its packages. Those of a Python
        # that is an environment's itself stay out of its sight, because venv goes back to that one's base.
        if [[ "$(torch_of "$candidate")" == fit* ]] && ! is_an_environments "$candidate"; then
            base="$candidate" visible="--system-site-packages"
            break
        fi
    done
    if [[ -z "$base" ]]; then
        echo "error: no Python 3.10, 3.11 or 3.12 found (looked for ${NEO_PYTHON:-python3, python," \
             "python3.11, python3.12, python3.10}): install one, or name it: NEO_PYTHON=/path/to/python" >&2
        return 2
    fi
    echo "environment: making $NEO_ENVIRONMENT with $("$base" --version)${visible:+ and its torch}"
    if ! "$base" -m venv $visible "$NEO_ENVIRONMENT" >&2; then
        rm -rf "$NEO_ENVIRONMENT"
        echo "error: $base cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 2
    fi
}

environment_hash() {
    "$PYTHON" - "$REPOSITORY_ROOT" <<'PYTHON_CODE'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
made_from = [str(root).encode(), sys.version.encode()]
made_from += [(root / name).read_bytes() for name in ("pyproject.toml", "setup.py", "requirements.txt")]
made_from += [path.read_bytes() for path in sorted((root / "megatron/pretrain/data/native").glob("*"))]
print(hashlib.sha256(b"\0".join(made_from)).hexdigest())
PYTHON_CODE
}

# True if the environment's megatron.pretrain is this clone's: another clone may have taken its place.
installed_from_here() {
    (cd / && "$PYTHON" -c 'import sys, megatron.pretrain as p; sys.exit(p.__path__[0] != sys.argv[1])' \
        "$REPOSITORY_ROOT/megatron/pretrain") 2>/dev/null
}

install_packages() {
    local log="${NEO_SETUP_LOG:-$NEO_ENVIRONMENT/neo-setup.log}"
    mkdir -p "$(dirname "$log")" && : > "$log" || return
    "$PYTHON" -m pip --version >/dev/null 2>&1 || run_logged "$log" "$PYTHON" -m ensurepip || return
    if [[ "$(torch_of "$PYTHON")" == none ]]; then
        local torch="$CPU_TORCH"
        if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then torch="$GPU_TORCH"; fi
        echo "environment: installing $torch (pip's output: $log)"
        run_logged "$log" "$PYTHON" -m pip install "$torch" || return
    fi
    local held="$NEO_ENVIRONMENT/neo-torch-constraint.txt"
    "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        > "$held" || return
    echo "environment: installing NEO and what it needs beside $(cat "$held") (pip's output: $log)"
    run_logged "$log" "$PYTHON" -m pip install --constraint "$held" --editable "$REPOSITORY_ROOT[dev]"
}

# run_logged LOG COMMAND...: its output goes to LOG, and is shown if it fails.
run_logged() {
    local log="$1"; shift
    echo "+ $*" >> "$log"
    if ! "$@" >> "$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "error: '$*' failed; the whole output is in $log" >&2
        return 1
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    set -euo pipefail
    setup_env
    echo "activate it with: source $VIRTUAL_ENV/bin/activate"
fi
