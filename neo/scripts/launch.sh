# What the pretrain_*.sh launchers share: they name a model's shape, `launch "$@"` does the rest.
#
# Sourced, never run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch() {
    read_arguments "$@"
    find_python
    choose_processes
    choose_layout
    choose_data
    choose_shape
    choose_batch
    choose_schedule
    choose_places
    choose_start
    collect_flags
    describe_run
    start_run
}

print_help() {
    cat <<HELP
usage: [VARIABLE=value ...] bash $0 [--dry-run] [-- FLAGS]

Trains a model of $MODEL's shape on the GPUs of this machine, or with CPU processes where there are none.
  --dry-run   print the command, the parameter count and the layout; start and create nothing
  -- FLAGS    flags for pretrain_gpt.py; they win over those that the variables give

Variables (an empty one counts as not set):
  data        DATA_PATH: a dataset's prefix, or 'weight prefix weight prefix', plain or base64.
              Not set: MIXTURE_ENV (mixture.env here), as gen_mixture_str.sh writes it, gives the data,
              the batch and TRAIN_ITERS.  TOKENIZER_MODEL_PATH (neo/tokenizer.model)
              ENABLE_SHUFFLE=true: shuffle documents too.  DATA_CACHE_PATH
  machine     GPUS_PER_NODE (the GPUs found; CPU processes where none is, then 1; 4 in a dry run)
              NNODES (1) NODE_RANK (0) MASTER_ADDR (localhost)
              MASTER_PORT (a free one; with several nodes 8874)
              DISTRIBUTED_BACKEND (nccl with GPUs, else gloo)  PYTHON
  layout      TP_SIZE ($DEFAULT_TP_SIZE, no more than there are processes) PP_SIZE (1) EP_SIZE (1)
              OVERLAP (true with several data-parallel GPUs, but not for -- --enable-cuda-graph): reduce
              gradients while the backward pass runs, gather weights while the forward pass does
  batch       MICRO_BATCH (1), and GRAD_ACC_STEPS (1) or GLOBAL_BATCH_SIZE
  model       NUM_LAYERS ($DEFAULT_NUM_LAYERS) HIDDEN_SIZE ($DEFAULT_HIDDEN_SIZE)
              FFN_HIDDEN_SIZE ($DEFAULT_FFN_HIDDEN_SIZE) NUM_HEADS ($DEFAULT_NUM_HEADS)
              NUM_KV_HEADS (${DEFAULT_NUM_KV_HEADS:-NUM_HEADS}) KV_CHANNELS (HIDDEN_SIZE / NUM_HEADS)
              SEQ_LEN ($DEFAULT_SEQ_LEN) MAX_POSITION_EMBEDDINGS (${DEFAULT_MAX_POSITION_EMBEDDINGS:-SEQ_LEN})
              PRECISION (bf16; or fp8, fp32) SEED (42)
  length      TRAIN_ITERS ($DEFAULT_TRAIN_ITERS) EXIT_ITERS (TRAIN_ITERS)
              SAVE_INTERVAL (2000) LOG_INTERVAL (1)
  schedule    LR (2e-4) MIN_LR (2e-5) LR_WARMUP_ITERS (2000, or a third of TRAIN_ITERS if that is less;
              0 in phase 2)
  places      OUTPUT_HOME (checkpoints/JOB/TASK_ID) TASK_ID (Pretrain); a run resumes from its own
              OUTPUT_HOME/checkpoint.  LOAD_CHECKPOINT_PATH: another run's checkpoint, whose weights
              alone are taken where there is none of its own
  other       WANDB_PROJECT: log to Weights & Biases, as WANDB_EXP_NAME.  PY_SCRIPT_PATH (pretrain_gpt.py)
HELP
}

# What stops a run only lessens a plan of it.
fail_unless_dry() {
    [[ "$DRY_RUN" == true ]] || fail "$@"
    printf 'warning: %s\n' "$*" >&2
}

read_arguments() {
    DRY_RUN=false
    PASSED_ON=()
    while (($#)); do
        case "$1" in
            --dry-run) DRY_RUN=true ;;
            -h | --help) print_help; exit 0 ;;
            --) shift; PASSED_ON=("$@"); return ;;
            *) fail "unknown argument '$1': a launcher takes --dry-run, --help, and after -- flags of" \
                    "pretrain_gpt.py" ;;
        esac
        shift
    done
}

# --- the machine --------------------------------------------------------------------------------------

count_gpus() {
    local listed
    listed="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
    if ((listed == 0)) || [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        echo "$listed"
        return
    fi
    # nvidia-smi does not look at CUDA_VISIBLE_DEVICES; -1 or nothing in it hides all.
    tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -v '^-1$' | grep -c . || true
}

# GPUS_PER_NODE, DISTRIBUTED_BACKEND, WORLD_SIZE
choose_processes() {
    local gpus
    gpus="$(count_gpus)"
    default NNODES 1
    whole NNODES 1
    if ((gpus > 0)); then
        default GPUS_PER_NODE "$gpus"
        default DISTRIBUTED_BACKEND nccl
    elif [[ "$DRY_RUN" == true && -z "${GPUS_PER_NODE:-}" ]]; then
        say "no GPU here: planned for 4 GPUs; set GPUS_PER_NODE to plan for CPU processes"
        GPUS_PER_NODE=4
        default DISTRIBUTED_BACKEND nccl
    else
        say "no GPU here: GPUS_PER_NODE counts CPU processes"
        default GPUS_PER_NODE 1
        default DISTRIBUTED_BACKEND gloo
    fi
    whole GPUS_PER_NODE 1
    one_of DISTRIBUTED_BACKEND nccl gloo
    # A plan may be for another machine.
    if [[ "$DISTRIBUTED_BACKEND" == nccl && "$DRY_RUN" == false ]] && ((GPUS_PER_NODE > gpus)); then
        fail "GPUS_PER_NODE=$GPUS_PER_NODE: $gpus GPUs are found here"
    fi
    WORLD_SIZE=$((NNODES * GPUS_PER_NODE))
    choose_meeting_point
}

choose_meeting_point() {
    if ((NNODES > 1)); then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] \
            || fail_unless_dry "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR" \
                "(the address of node 0)"
    elif [[ -z "${MASTER_PORT:-}" ]]; then
        # Launchers that are started together look for it from different ports on.
        MASTER_PORT="$(free_port "$((8874 + $$ % 1000))")"
    fi
    default NODE_RANK 0
    default MASTER_ADDR localhost
    default MASTER_PORT 8874
    whole NODE_RANK 0
    whole MASTER_PORT 1
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK: must be below NNODES=$NNODES"
}

# free_port FIRST: the first port from FIRST on that nobody listens at, so that two runs share a machine.
free_port() {
    local port="$1"
    while (: < "/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

# TP_SIZE, PP_SIZE, EP_SIZE, DP_SIZE, OVERLAP
choose_layout() {
    default TP_SIZE "$((WORLD_SIZE < DEFAULT_TP_SIZE ? WORLD_SIZE : DEFAULT_TP_SIZE))"
    default PP_SIZE 1
    default EP_SIZE 1
    whole TP_SIZE 1
    whole PP_SIZE 1
    whole EP_SIZE 1
    ((WORLD_SIZE % (TP_SIZE * PP_SIZE) == 0)) \
        || fail "$WORLD_SIZE processes (NNODES=$NNODES x GPUS_PER_NODE=$GPUS_PER_NODE) are not a multiple" \
            "of TP_SIZE=$TP_SIZE x PP_SIZE=$PP_SIZE"
    DP_SIZE=$((WORLD_SIZE / (TP_SIZE * PP_SIZE)))
    # CPU processes would take the cores for it from each other; a graph cannot record it.
    if ((DP_SIZE > 1)) && [[ "$DISTRIBUTED_BACKEND" == nccl && " ${PASSED_ON[*]-} " != *" --enable-cuda-graph "* ]]
    then default OVERLAP true; fi
    default OVERLAP false
    one_of OVERLAP true false
}

# --- the run ------------------------------------------------------------------------------------------

# DATA_FLAGS, MIXTURE_TRAIN_ITERS, and from mixture.env GLOBAL_BATCH_SIZE and SEQ_LEN
choose_data() {
    local settings line words missing=()
    DATA_FLAGS=()
    MIXTURE_TRAIN_ITERS=""
    default MIXTURE_ENV mixture.env
    if [[ -n "${DATA_PATH:-}" ]]; then
        settings="$(data_settings --data-path "$DATA_PATH")" || exit
        DATA_SOURCE="DATA_PATH"
    elif [[ -f "$MIXTURE_ENV" ]]; then
        settings="$(data_settings --env-file "$MIXTURE_ENV")" || exit
        DATA_SOURCE="$MIXTURE_ENV"
    else
        fail_unless_dry "DATA_PATH is not set and there is no $MIXTURE_ENV here; set it, or let" \
            "bash neo/scripts/gen_mixture_str.sh write that file"
        DATA_SOURCE="nowhere"
        return
    fi
    # The lines are data: each is matched against the names below, none is run.
    while IFS= read -r line; do
        case "$line" in
            DATA_PATH=*)
                read -r -a words <<< "${line#*=}"
                DATA_FLAGS=(--data-path "${words[@]}") ;;
            BLEND_FILE=*) DATA_FLAGS=(--data-args-path "${line#*=}") ;;
            MISSING=*) missing+=("${line#*=}") ;;
            TRAIN_ITERS=*) MIXTURE_TRAIN_ITERS="${line#*=}" ;;
            GLOBAL_BATCH_SIZE=*) from_mixture GLOBAL_BATCH_SIZE "${line#*=}" ;;
            SEQ_LEN=*) from_mixture SEQ_LEN "${line#*=}" ;;
        esac
    done <<< "$settings"
    if ((${#missing[@]})); then
        fail_unless_dry "$DATA_SOURCE names ${#missing[@]} dataset(s) that are not here, first" \
            "${missing[0]} (.bin and .idx); paths are relative to $PWD"
    fi
    if [[ -n "$MIXTURE_TRAIN_ITERS" ]]; then DATA_FLAGS+=(--data-weights tokens); fi
}

data_settings() {
    env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 \
        "$PYTHON" "$SCRIPTS/launch_data.py" "$@"
}

# from_mixture NAME VALUE: the mixture was made for this value, and TRAIN_ITERS is right for it alone.
from_mixture() {
    default "$1" "$2"
    [[ "${!1}" == "$2" ]] \
        || fail "$1=${!1}, but $MIXTURE_ENV was made for $1=$2: its TRAIN_ITERS would train another" \
            "number of tokens; unset $1, or change the mixture's YAML file and run gen_mixture_str.sh again"
}

choose_shape() {
    default NUM_LAYERS "$DEFAULT_NUM_LAYERS"
    default HIDDEN_SIZE "$DEFAULT_HIDDEN_SIZE"
    default FFN_HIDDEN_SIZE "$DEFAULT_FFN_HIDDEN_SIZE"
    default NUM_HEADS "$DEFAULT_NUM_HEADS"
    default NUM_KV_HEADS "${DEFAULT_NUM_KV_HEADS:-$NUM_HEADS}"
    default SEQ_LEN "$DEFAULT_SEQ_LEN"
    default MAX_POSITION_EMBEDDINGS "${DEFAULT_MAX_POSITION_EMBEDDINGS:-$SEQ_LEN}"
    default KV_CHANNELS ""
    default PRECISION bf16
    local name
    for name in NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_HEADS NUM_KV_HEADS SEQ_LEN \
        MAX_POSITION_EMBEDDINGS; do
        whole "$name" 1
    done
    [[ -z "$KV_CHANNELS" ]] || whole KV_CHANNELS 1
    one_of PRECISION bf16 fp8 fp32
}

# GLOBAL_BATCH and GRAD_ACC_STEPS; GLOBAL_BATCH_SIZE may be given, by the mixture or by the environment.
choose_batch() {
    default MICRO_BATCH 1
    whole MICRO_BATCH 1
    local at_once=$((DP_SIZE * MICRO_BATCH)) asked="${GLOBAL_BATCH_SIZE:-}"
    local made_for="GLOBAL_BATCH_SIZE=$asked"
    if [[ -n "$MIXTURE_TRAIN_ITERS" ]]; then made_for+=" of $MIXTURE_ENV"; fi
    if [[ -n "$asked" ]]; then
        whole GLOBAL_BATCH_SIZE 1
        ((asked % at_once == 0)) \
            || fail "$made_for is not a multiple of $DP_SIZE data-parallel ranks x MICRO_BATCH=$MICRO_BATCH"
        default GRAD_ACC_STEPS $((asked / at_once))
    fi
    default GRAD_ACC_STEPS 1
    whole GRAD_ACC_STEPS 1
    GLOBAL_BATCH=$((at_once * GRAD_ACC_STEPS))
    [[ -z "$asked" ]] || ((GLOBAL_BATCH == asked)) \
        || fail "GRAD_ACC_STEPS=$GRAD_ACC_STEPS x $DP_SIZE data-parallel ranks x MICRO_BATCH=$MICRO_BATCH" \
            "is $GLOBAL_BATCH samples a step, not the $made_for; unset GRAD_ACC_STEPS to have" \
            "$((asked / at_once))"
}

choose_schedule() {
    default TRAIN_ITERS "${MIXTURE_TRAIN_ITERS:-$DEFAULT_TRAIN_ITERS}"
    whole TRAIN_ITERS 1
    if [[ -n "$MIXTURE_TRAIN_ITERS" ]] && ((TRAIN_ITERS > MIXTURE_TRAIN_ITERS)); then
        fail "TRAIN_ITERS=$TRAIN_ITERS is more than the $MIXTURE_TRAIN_ITERS that the tokens of" \
            "$MIXTURE_ENV suffice for; unset it, or raise the mixture's rounds"
    fi
    default EXIT_ITERS "$TRAIN_ITERS"
    default SAVE_INTERVAL 2000
    default LOG_INTERVAL 1
    default SEED 42
    whole EXIT_ITERS 1
    whole SAVE_INTERVAL 1
    whole LOG_INTERVAL 1
    whole SEED 0
    default LR 2e-4
    default MIN_LR 2e-5
    if [[ "${phase:-}" == decay ]]; then
        default LR_WARMUP_ITERS 0
    else
        # NEO's own 2000 of 6000 iterations; a shorter run keeps the proportion.
        default LR_WARMUP_ITERS $((TRAIN_ITERS < 6000 ? TRAIN_ITERS / 3 : 2000))
    fi
    whole LR_WARMUP_ITERS 0
}

choose_places() {
    default TOKENIZER_MODEL_PATH "$ROOT/neo/tokenizer.model"
    [[ -e "$TOKENIZER_MODEL_PATH" ]] || fail "TOKENIZER_MODEL_PATH=$TOKENIZER_MODEL_PATH: no such file"
    default PY_SCRIPT_PATH "$ROOT/pretrain_gpt.py"
    [[ -f "$PY_SCRIPT_PATH" ]] || fail "PY_SCRIPT_PATH=$PY_SCRIPT_PATH: no such file"
    default ENABLE_SHUFFLE false
    one_of ENABLE_SHUFFLE true false
    default TASK_ID Pretrain
    JOB_NAME="${MODEL}_nl${NUM_LAYERS}_tp${TP_SIZE}_pp${PP_SIZE}_mb${MICRO_BATCH}_gb${GLOBAL_BATCH}"
    JOB_NAME+="_gas${GRAD_ACC_STEPS}"
    default OUTPUT_HOME "checkpoints/$JOB_NAME/$TASK_ID"
    CHECKPOINT_PATH="$OUTPUT_HOME/checkpoint"
}

# LOAD_FLAGS: its own checkpoint, so that a crash is no new start; or else the weights of another run.
choose_start() {
    LOAD_FLAGS=()
    STARTS_FROM="the beginning"
    # A save in progress has a hidden name, which ls leaves out.
    if [[ -n "$(ls "$CHECKPOINT_PATH" 2>/dev/null)" ]]; then
        STARTS_FROM="its own checkpoint"
        LOAD_FLAGS=(--load "$CHECKPOINT_PATH")
    elif [[ -n "${LOAD_CHECKPOINT_PATH:-}" ]]; then
        is_checkpoint "$LOAD_CHECKPOINT_PATH" \
            || fail_unless_dry "LOAD_CHECKPOINT_PATH=$LOAD_CHECKPOINT_PATH: no checkpoint there; it must" \
                "hold latest_checkpointed_iteration.txt, or be one iteration's folder"
        STARTS_FROM="the weights of $LOAD_CHECKPOINT_PATH"
        LOAD_FLAGS=(--load "$LOAD_CHECKPOINT_PATH" --finetune)
    elif [[ "${phase:-}" == decay ]]; then
        fail_unless_dry "LOAD_CHECKPOINT_PATH is not set: phase 2 starts from another run's weights"
        STARTS_FROM="nothing yet"
    fi
}

is_checkpoint() {
    [[ -s "$1/latest_checkpointed_iteration.txt" || (-d "$1" && "$(basename "$1")" == iter_*) ]]
}

# --- the command --------------------------------------------------------------------------------------

# FLAGS: everything that pretrain_gpt.py is told.
collect_flags() {
    FLAGS=(
        --use-mcore-models
        --num-layers "$NUM_LAYERS"
        --hidden-size "$HIDDEN_SIZE"
        --ffn-hidden-size "$FFN_HIDDEN_SIZE"
        --num-attention-heads "$NUM_HEADS"
        --max-position-embeddings "$MAX_POSITION_EMBEDDINGS"
        --group-query-attention
        --num-query-groups "$NUM_KV_HEADS"
        --swiglu
        --normalization RMSNorm
        --use-rotary-position-embeddings
        --untie-embeddings-and-output-weights
        --no-position-embedding
        --attention-dropout 0
        --hidden-dropout 0
        --disable-bias-linear
    )
    [[ -z "$KV_CHANNELS" ]] || FLAGS+=(--kv-channels "$KV_CHANNELS")
    FLAGS+=(
        --seed "$SEED"
        --seq-length "$SEQ_LEN"
        --micro-batch-size "$MICRO_BATCH"
        --global-batch-size "$GLOBAL_BATCH"
        --eod-mask-loss
        --norm-epsilon 1e-5
        --lr "$LR"
        --min-lr "$MIN_LR"
        --lr-warmup-iters "$LR_WARMUP_ITERS"
        --clip-grad 1.0
        --weight-decay 0.1
        --adam-beta1 0.9
        --adam-beta2 0.95
        --adam-eps 1e-8
        --init-method-std 0.02
        --override-opt_param-scheduler
    )
    [[ "$PRECISION" == fp32 ]] || FLAGS+=(--bf16)
    [[ "$PRECISION" != fp8 ]] || FLAGS+=(--fp8)
    if [[ "${phase:-}" == decay ]]; then
        FLAGS+=(--lr-decay-style wsd --wsd_decay_ratio 0.1 --wsd_half_life -1 --lr_stable_steps 0)
    else
        FLAGS+=(--lr-decay-style cosine)
    fi
    local readers=8
    # On a CPU each reader would take a core from the training itself.
    [[ "$DISTRIBUTED_BACKEND" == nccl ]] || readers=1
    FLAGS+=(
        --num-workers "$readers"
        --distributed-backend "$DISTRIBUTED_BACKEND"
        --tensor-model-parallel-size "$TP_SIZE"
        --pipeline-model-parallel-size "$PP_SIZE"
        --expert-model-parallel-size "$EP_SIZE"
        --use-distributed-optimizer
        --optimizer adam
        --train-iters "$TRAIN_ITERS"
        --exit-interval "$EXIT_ITERS"
    )
    # The engine refuses it where there is nothing to split.
    ((TP_SIZE == 1)) || FLAGS+=(--sequence-parallel)
    [[ "$OVERLAP" == false ]] || FLAGS+=(--overlap-grad-reduce --overlap-param-gather)
    FLAGS+=(
        ${DATA_FLAGS[@]+"${DATA_FLAGS[@]}"}
        --tokenizer-type SentencePieceTokenizer
        --tokenizer-model "$TOKENIZER_MODEL_PATH"
        --split 1000,0,0
    )
    [[ "$ENABLE_SHUFFLE" == false ]] || FLAGS+=(--enable-shuffle)
    [[ -z "${DATA_CACHE_PATH:-}" ]] || FLAGS+=(--data-cache-path "$DATA_CACHE_PATH")
    FLAGS+=(
        --log-interval "$LOG_INTERVAL"
        --save-interval "$SAVE_INTERVAL"
        --eval-iters 0
        --eval-interval 1000000
        --timing-log-level 0
        --save "$CHECKPOINT_PATH"
        ${LOAD_FLAGS[@]+"${LOAD_FLAGS[@]}"}
    )
    if [[ -n "${WANDB_PROJECT:-}" ]]; then
        FLAGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_EXP_NAME:-${TASK_ID}_$JOB_NAME}"
                --wandb-save-dir "$OUTPUT_HOME")
    fi
    FLAGS+=(${PASSED_ON[@]+"${PASSED_ON[@]}"})
}

describe_run() {
    say "GPUS_PER_NODE: $GPUS_PER_NODE, NNODES: $NNODES, NODE_RANK: $NODE_RANK, WORLD_SIZE: $WORLD_SIZE"
    say "MASTER_ADDR: $MASTER_ADDR, MASTER_PORT: $MASTER_PORT, DISTRIBUTED_BACKEND: $DISTRIBUTED_BACKEND"
    say "DP_SIZE: $DP_SIZE, TP_SIZE: $TP_SIZE, PP_SIZE: $PP_SIZE"
    say "Global batch size: $GLOBAL_BATCH, micro batch size: $MICRO_BATCH, GRAD_ACC_STEPS: $GRAD_ACC_STEPS"
    say "TRAIN_ITERS: $TRAIN_ITERS, LR_WARMUP_ITERS: $LR_WARMUP_ITERS, SAVE_INTERVAL: $SAVE_INTERVAL"
    say "DATA_PATH (from $DATA_SOURCE): ${DATA_FLAGS[*]-}"
    say "TOKENIZER_MODEL_PATH: $TOKENIZER_MODEL_PATH, ENABLE_SHUFFLE: $ENABLE_SHUFFLE"
    say "JOB_NAME: $JOB_NAME, TASK_ID: $TASK_ID"
    say "CHECKPOINT_PATH: $CHECKPOINT_PATH, starts from $STARTS_FROM"
}

start_run() {
    local settings=(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}") torchrun
    if [[ "$DISTRIBUTED_BACKEND" == gloo ]]; then
        settings+=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_a_process)}")
    else
        # flash-attn-4 compiles its kernels at every start, unless it is asked to keep them.
        settings+=(FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="${FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED:-1}")
        # One hardware queue keeps a collective behind the product it should hide under (before Blackwell).
        ((TP_SIZE == 1)) || settings+=(CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}")
    fi
    torchrun=("$(dirname "$PYTHON")/torchrun")
    [[ -x "${torchrun[0]}" ]] || torchrun=("$PYTHON" -m torch.distributed.run)
    local command=(env "${settings[@]}" "${torchrun[@]}" --nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES"
                   --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
                   "$PY_SCRIPT_PATH" "${FLAGS[@]}")
    local plan=(env "${settings[@]}" PYTHONDONTWRITEBYTECODE=1 WORLD_SIZE="$WORLD_SIZE"
                "$PYTHON" "$PY_SCRIPT_PATH" "${FLAGS[@]}" --dry-run)
    echo "----------------------------------------------------"
    quoted "${command[@]}"
    echo "----------------------------------------------------"
    if [[ "$DRY_RUN" == true ]]; then exec "${plan[@]}"; fi
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
        || fail "$PYTHON has no torch; bash neo/scripts/setup_env.sh makes an environment that has"
    # What the flags have wrong is one sentence here; under torchrun it would be a report of every rank.
    "${plan[@]}" > /dev/null || exit
    exec "${command[@]}"
}

threads_a_process() {
    local cores
    cores="$(getconf _NPROCESSORS_ONLN)"
    echo $((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))
}
