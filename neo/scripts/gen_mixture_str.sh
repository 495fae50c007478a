#!/usr/bin/env bash
# Prints the mixture string and TRAIN_ITERS of mixture_cfg.yml (-c FILE: of another file), and writes
# mixture.env, which the launchers read where DATA_PATH is not set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

find_python
exec env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" \
    "$PYTHON" "$SCRIPTS/parse_mixture.py" --cfg "$SCRIPTS/mixture_cfg.yml" "$@"
