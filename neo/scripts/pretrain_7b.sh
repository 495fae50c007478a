#!/usr/bin/env bash
# NEO-7B: 16 heads of 192. `--help` lists the variables that change the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL="NEO_7b${phase:+_phase2}"
DEFAULT_NUM_LAYERS=28
DEFAULT_HIDDEN_SIZE=3072
DEFAULT_FFN_HIDDEN_SIZE=24576
DEFAULT_NUM_HEADS=16
DEFAULT_SEQ_LEN=8192
DEFAULT_TP_SIZE=2
DEFAULT_TRAIN_ITERS=6000

launch "$@"
