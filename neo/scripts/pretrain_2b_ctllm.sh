#!/usr/bin/env bash
# CT-LLM-2B: 16 heads of 128. `--help` lists the variables that change the run.
# CT-LLM itself was trained with Baichuan's tokenizer: give it as TOKENIZER_MODEL_PATH.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL=CTLLM_2b
DEFAULT_NUM_LAYERS=32
DEFAULT_HIDDEN_SIZE=2048
DEFAULT_FFN_HIDDEN_SIZE=5504
DEFAULT_NUM_HEADS=16
DEFAULT_SEQ_LEN=8192
DEFAULT_MAX_POSITION_EMBEDDINGS=4096
DEFAULT_TP_SIZE=1
DEFAULT_TRAIN_ITERS=600400

launch "$@"
