#!/usr/bin/env bash
# From nothing to a small language model that talks, on a laptop with no GPU, in under ten minutes.
#
#   bash neo/scripts/quickstart.sh [--keep]
#
# Every step is a command that a real run uses, with its own defaults replaced by smaller numbers. Nothing
# is downloaded but the packages that it needs: the text is the running Python's own standard library.
#   --keep    go on where an earlier quickstart stopped: do only what it had not finished
#
# Settings: QUICKSTART_HOME (out/quickstart), and the numbers below under the names they have here.
set -euo pipefail
HOME_DIR="${QUICKSTART_HOME:-}"
[[ -z "$HOME_DIR" || "$HOME_DIR" == /* ]] || HOME_DIR="$PWD/$HOME_DIR"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${HOME_DIR:=out/quickstart}"     # relative, so that what is printed stays short

source neo/scripts/common.sh
source neo/scripts/setup_env.sh

# The corpus and the tokenizer.
default CORPUS_MEGABYTES 1.6
default VOCAB_SIZE 2000
default DOCS_ROUNDS 2.0

# The model and its training, under the launchers' names.
default NUM_LAYERS 4
default HIDDEN_SIZE 192
default FFN_HIDDEN_SIZE 512
default NUM_HEADS 4
default NUM_KV_HEADS 2
default SEQ_LEN 256
default GLOBAL_BATCH_SIZE 8
default LR 2e-3
default PRECISION fp32
default PHASE_2_LR 6e-4     # where phase 1 ends and phase 2 begins
default PHASE_2_ITERS 60

PROMPT='def __init__(self, '
CONTINUATION_TOKENS=64
RESULT_FILE="$HOME_DIR/result"

# --- steps: each a function that ends with `result WHAT WHERE` ----------------------------------------

make_corpus() {
    "$PYTHON" neo/quickstart/corpus.py --output "$HOME_DIR/corpus" --megabytes "$CORPUS_MEGABYTES"
    result "wrote documents out of Python's standard library" "$HOME_DIR/corpus/"
}

train_tokenizer() {
    "$PYTHON" tools/train_tokenizer.py --output-prefix "$HOME_DIR/tokenizer" --vocab-size "$VOCAB_SIZE" \
        --input "$HOME_DIR/corpus/stdlib_code.jsonl" "$HOME_DIR/corpus/stdlib_docs.jsonl" \
        --held-out "$HOME_DIR/corpus/heldout.jsonl"
    result "learnt $VOCAB_SIZE SentencePiece pieces" "$HOME_DIR/tokenizer.model"
}

preprocess_sources() {
    local source
    mkdir -p "$HOME_DIR/data"
    for source in code docs; do
        "$PYTHON" tools/preprocess_data.py --input "$HOME_DIR/corpus/stdlib_$source.jsonl" \
            --output-prefix "$HOME_DIR/data/$source" --tokenizer-type SentencePieceTokenizer \
            --tokenizer-model "$HOME_DIR/tokenizer.model" --keep-sequential-samples --append-eod
    done
    result "turned two sources into token streams" "$HOME_DIR/data/"
}

count_tokens() {
    local counted
    counted="$("$PYTHON" tools/count_mmap_token.py \
        --mmap_path "$HOME_DIR/data/code_text_document" "$HOME_DIR/data/docs_text_document")"
    printf '%s\n' "$counted"
    result "counted ${counted##* } tokens" "$HOME_DIR/logs/04_count.log"
}

mix_sources() {
    cat > "$HOME_DIR/mixture.yml" <<YML
GLOBAL_BATCH_SIZE: $GLOBAL_BATCH_SIZE
SEQ_LEN: $SEQ_LEN
1.0_ROUND:
  - $HOME_DIR/data/code_text_document.bin
${DOCS_ROUNDS}_ROUND:
  - $HOME_DIR/data/docs_text_document.bin
YML
    bash neo/scripts/gen_mixture_str.sh --cfg "$HOME_DIR/mixture.yml"
    result "mixed code once, docs $DOCS_ROUNDS times: $(train_iters) iterations" "$MIXTURE_ENV"
}

pretrain_half() {
    EXIT_ITERS="$(($(train_iters) / 2))" phase_1
    result "pre-trained with two ranks, stopped halfway" "$HOME_DIR/pretrain/checkpoint/"
}

pretrain_rest() {
    phase_1
    result "resumed, and trained to the end of the mixture" "$HOME_DIR/pretrain/checkpoint/"
}

decay() {
    LR="$PHASE_2_LR" MIN_LR=1e-5 TRAIN_ITERS="$PHASE_2_ITERS" OUTPUT_HOME="$HOME_DIR/decay" \
        LOAD_CHECKPOINT_PATH="$HOME_DIR/pretrain/checkpoint" bash neo/scripts/pretrain_7b_phase2.sh
    result "phase 2: from those weights, the rate decaying" "$HOME_DIR/decay/checkpoint/"
}

convert() {
    local billions
    billions="$("$PYTHON" -c "print($PHASE_2_ITERS * $GLOBAL_BATCH_SIZE * $SEQ_LEN / 1e9)")"
    cat > "$HOME_DIR/converter.yml" <<YML
MEGATRON_CHECKPOINT_PATH: $HOME_DIR/decay/checkpoint
HF_CHECKPOINT_PATH: $HOME_DIR/hf
CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS: [$billions]
TOKENIZER_DIR: $HOME_DIR/tokenizer.model
BF16: false
YML
    bash neo/scripts/batch_convert_ckpt.sh --config "$HOME_DIR/converter.yml"
    result "wrote a Hugging Face folder" "$(converted_model)"
}

speak() {
    # The engine warns of every accelerator's library that is not here.
    PYTHONWARNINGS=ignore "$PYTHON" -m megatron.pretrain.train.greedy \
        --load "$HOME_DIR/decay/checkpoint" --prompt "$PROMPT" \
        --max-new-tokens "$CONTINUATION_TOKENS" --json > "$HOME_DIR/continuation.json"
    "$PYTHON" neo/quickstart/speak.py --model "$(converted_model)" --prompt "$PROMPT" \
        --max-new-tokens "$CONTINUATION_TOKENS" --expect "$HOME_DIR/continuation.json"
    result "continued '$PROMPT', as the training model does" "$HOME_DIR/logs/10_talk.log"
}

measure() {
    "$PYTHON" neo/quickstart/heldout.py --model "$(converted_model)" --mixture "$HOME_DIR/mixture.yml" \
        --documents "$HOME_DIR/corpus/heldout.jsonl" --tokenizer-model "$HOME_DIR/tokenizer.model" \
        --seq-length "$SEQ_LEN" --output "$HOME_DIR/heldout.json"
    result "held-out loss below the bigram model's" "$HOME_DIR/heldout.json"
}

phase_1() {
    MIN_LR="$PHASE_2_LR" LR_WARMUP_ITERS="$(($(train_iters) / 20))" \
        OUTPUT_HOME="$HOME_DIR/pretrain" bash neo/scripts/pretrain_2b.sh
}

train_iters() { sed -n 's/^TRAIN_ITERS=//p' "$MIXTURE_ENV"; }

# The one folder of $HOME_DIR/hf that holds a model.
converted_model() { dirname "$(ls "$HOME_DIR"/hf/*/config.json)"; }

# --- running them -------------------------------------------------------------------------------------

main() {
    local keep=false started
    case "${1:-}" in
        "") ;;
        --keep) keep=true ;;
        -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' neo/scripts/quickstart.sh; exit 0 ;;
        *) fail "unknown argument '$1': quickstart.sh takes --keep or --help" ;;
    esac
    prepare_home "$keep"
    started=$SECONDS
    NEO_SETUP_LOG="$HOME_DIR/logs/00_environment.log" setup_env
    record 00 environment "$((SECONDS - started))" "Python, torch, megatron-core, and this repository" \
        "${VIRTUAL_ENV#"$ROOT"/}"
    set_for_launchers
    step 01 corpus quiet make_corpus
    step 02 tokenizer quiet train_tokenizer
    step 03 preprocess quiet preprocess_sources
    step 04 count quiet count_tokens
    step 05 mix shown mix_sources
    step 06 pretrain quiet pretrain_half
    step 07 resume quiet pretrain_rest
    step 08 decay quiet decay
    step 09 convert quiet convert
    step 10 talk shown speak
    step 11 measure shown measure
    "$PYTHON" neo/quickstart/report.py "$HOME_DIR"
}

# What the launchers read; what they would else take from a run that this shell was set up for is dropped.
set_for_launchers() {
    unset DATA_PATH TRAIN_ITERS EXIT_ITERS GRAD_ACC_STEPS LOAD_CHECKPOINT_PATH TP_SIZE PP_SIZE \
        NNODES NODE_RANK MASTER_ADDR MASTER_PORT ENABLE_SHUFFLE KV_CHANNELS MAX_POSITION_EMBEDDINGS \
        PY_SCRIPT_PATH WANDB_PROJECT
    export NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_HEADS NUM_KV_HEADS SEQ_LEN LR PRECISION
    export MIXTURE_ENV="$HOME_DIR/mixture.env" TOKENIZER_MODEL_PATH="$HOME_DIR/tokenizer.model"
    export LOG_INTERVAL=10 SAVE_INTERVAL=200 GPUS_PER_NODE=2
    # Two ranks, but a GPU takes no more than one.
    [[ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)" != 1 ]] || GPUS_PER_NODE=1
    export MICRO_BATCH="$((GLOBAL_BATCH_SIZE / GPUS_PER_NODE))"
}

# Empties an earlier quickstart's folder, unless told to keep it; another folder's files are left alone.
prepare_home() {
    [[ ! "$HOME_DIR" =~ [[:space:]] ]] \
        || fail "QUICKSTART_HOME=$HOME_DIR: has a space in it, which a mixture cannot hold"
    [[ -z "$(ls -A "$HOME_DIR" 2>/dev/null)" || -d "$HOME_DIR/steps" ]] \
        || fail "QUICKSTART_HOME=$HOME_DIR: is not empty and holds no earlier quickstart; name a folder" \
            "that is new or empty"
    [[ "$1" == true ]] || rm -rf "$HOME_DIR"
    mkdir -p "$HOME_DIR/steps" "$HOME_DIR/logs"
}

# step NUMBER NAME quiet|shown FUNCTION: runs it once, all output into its log.
step() {
    local number="$1" name="$2" display="$3" function="$4" log="$HOME_DIR/logs/$1_$2.log" started=$SECONDS
    if [[ -f "$HOME_DIR/steps/$number" ]]; then
        echo "$name: kept"
        return
    fi
    echo "$name ..."
    set +e      # in a condition, `set -e` would not hold inside the function
    (set -e; "$function") < /dev/null 2>&1 | "$display" "$log"
    local status="${PIPESTATUS[0]}"
    set -e
    if ((status != 0)); then
        [[ "$display" == shown ]] || tail -n 30 "$log" >&2
        fail "the step '$name' failed; its output is in $log"
    fi
    record "$number" "$name" "$((SECONDS - started))" "$(cut -f1 "$RESULT_FILE")" "$(cut -f2 "$RESULT_FILE")"
}

# What a step did and where: for the table at the end.
result() { printf '%s\t%s\n' "$1" "$2" > "$RESULT_FILE"; }

# record NUMBER NAME SECONDS WHAT WHERE
record() { printf '%s\t%s\t%s\t%s\n' "$2" "$3" "$4" "${5#"$HOME_DIR"/}" > "$HOME_DIR/steps/$1"; }

shown() { tee "$1"; }

# The last line as it comes, in place on a terminal; a line every 15 s elsewhere.
quiet() {
    local line last=$SECONDS width
    width="$(tput cols 2>/dev/null || echo 100)"
    : > "$1"
    while IFS= read -r line; do
        printf '%s\n' "$line" >> "$1"
        if [[ -t 1 ]]; then
            shorten "$line"
            printf '\r\033[K  %s' "${SHORT:0:$((width - 3))}"
        elif ((SECONDS - last >= 15)); then
            shorten "$line"
            printf '  %s\n' "${SHORT:0:110}"
            last=$SECONDS
        fi
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}

# shorten LINE: sets SHORT, to what matters of a line that the trainer logs.
shorten() {
    local of_training='iteration +([0-9]+)/ *([0-9]+) .*tokens per second: ([0-9]+).*lm loss: ([0-9.E+-]+)'
    SHORT="$1"
    [[ ! "$1" =~ $of_training ]] || printf -v SHORT 'iteration %s of %s, %s tokens/s, loss %.3f' \
        "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" "${BASH_REMATCH[3]}" "${BASH_REMATCH[4]}"
}

main "$@"
