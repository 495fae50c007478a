#!/usr/bin/env bash
# Converts the checkpoints that converter_cfg.yml (--config FILE: another file) chooses to Hugging Face
# folders. Everything after the script's name is passed on; --help lists it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

find_python
exec env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" \
    "$PYTHON" "$SCRIPTS/batch_convert_ckpt.py" --config "$SCRIPTS/converter_cfg.yml" "$@"
