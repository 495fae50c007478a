#!/usr/bin/env bash
# NEO-2B: 8 heads of 256 share one key/value head. `--help` lists the variables that change the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=NEO_2b
DEFAULT_NUM_LAYERS=18
DEFAULT_HIDDEN_SIZE=2048
DEFAULT_FFN_HIDDEN_SIZE=16384
DEFAULT_NUM_HEADS=8
DEFAULT_NUM_KV_HEADS=1
DEFAULT_SEQ_LEN=8192
DEFAULT_TP_SIZE=1
DEFAULT_TRAIN_ITERS=600400

launch "$@"
