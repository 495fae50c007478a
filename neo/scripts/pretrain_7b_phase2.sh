#!/usr/bin/env bash
# NEO-7B, phase 2: the weights of LOAD_CHECKPOINT_PATH, and a rate that decays from the first step on.
# Its own checkpoints go before them, so a crash does not start the decay again.
phase=decay
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_7b.sh"
