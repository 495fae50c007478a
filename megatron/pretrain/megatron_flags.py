"""Megatron-LM's flags that are no settings here: those that state what is always so, and those we refuse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statement:
    """A flag that is accepted because it says what NEO does anyway."""

    values_count: int = 0
    """Words that follow the flag."""
    allowed: tuple[str, ...] | None = None
    """The values that are true here; None for any."""
    why: str = ""


STATEMENTS: dict[str, Statement] = {
    "--use-mcore-models": Statement(),
    "--swiglu": Statement(),
    "--disable-bias-linear": Statement(),
    "--use-rotary-position-embeddings": Statement(),
    "--no-position-embedding": Statement(),
    "--position-embedding-type": Statement(1, ("rope",), "NEO models use rotary position embeddings (rope)"),
    "--normalization": Statement(1, ("RMSNorm",), "NEO models use RMSNorm"),
    "--rotary-percent": Statement(1, ("1", "1.0"), "NEO models rotate the whole head (1.0)"),
    "--accumulate-allreduce-grads-in-fp32": Statement(),
    "--attention-softmax-in-fp32": Statement(),
    "--use-flash-attn": Statement(),
    "--no-async-tensor-model-parallel-allreduce": Statement(),
    "--timing-log-level": Statement(1),
    "--log-throughput": Statement(),
    "--no-create-attention-mask-in-dataloader": Statement(),
    "--no-gradient-accumulation-fusion": Statement(),
    "--no-masked-softmax-fusion": Statement(),
    "--no-bias-dropout-fusion": Statement(),
    "--no-rope-fusion": Statement(),
    "--no-persist-layer-norm": Statement(),
    "--use-dist-ckpt": Statement(),
    "--ckpt-fully-parallel-save": Statement(),
    "--dist-ckpt-format": Statement(1, ("torch_dist",), "checkpoints are saved in torch_dist format"),
    "--data-impl": Statement(1, ("mmap",), "datasets are memory-mapped .bin/.idx files (mmap)"),
    "--dataloader-type": Statement(1, ("single",), "samples are read in one resumable order (single)"),
}

# Names alone: an unknown flag that Megatron-LM knows deserves a better answer than "unknown".
UNSUPPORTED: frozenset[str] = frozenset("--" + name for name in """
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split adlr-autoresume
    adlr-autoresume-interval align-grad-reduce align-param-gather apply-layernorm-1p
    apply-query-key-layer-scaling apply-residual-connection-post-layernorm apply-rope-fusion async-save
    async-tensor-model-parallel-allreduce attention-backend attn-impl auto-detect-ckpt-format
    bert-embedder-type bert-load bias-dropout-fusion bias-gelu-fusion bias-swiglu-fusion
    biencoder-projection-dim check-for-large-grads check-for-nan-in-loss-and-grad
    check-weight-hash-across-dp-replicas-interval checkpoint-activations ckpt-assume-constant-structure
    ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format
    ckpt-fully-parallel-load ckpt-step clone-scatter-output-in-embedding cp-comm-type
    cpu-offloading-num-layers create-attention-mask-in-dataloader cross-entropy-fusion-impl
    cross-entropy-loss-fusion cuda-graph-impl cuda-graph-scope cuda-graph-warmup-steps
    data-parallel-random-init data-parallel-sharding-strategy data-sharding ddp-average-in-collective
    ddp-bucket-size ddp-num-buckets decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    decoder-num-layers decoder-seq-length decoupled-lr decoupled-min-lr decrease-batch-size-if-needed
    defer-embedding-wgrad-compute delay-wgrad-compute disable-bf16-reduced-precision-matmul
    disable-straggler-on-startup dist-ckpt-strictness distribute-saved-activations
    embedding-init-method-std embedding-path empty-unused-memory-level
    enable-experimental enable-ft-package enable-gloo-process-groups enable-msc enable-one-logger
    encoder-num-layers encoder-pipeline-model-parallel-size encoder-seq-length
    encoder-tensor-model-parallel-size end-weight-decay error-injection-rate error-injection-type
    exit-on-missing-checkpoint exit-signal exit-signal-handler exp-avg-dtype exp-avg-sq-dtype
    expert-tensor-parallel-size external-cuda-graph finetune-lr flash-decode fp16
    fp8-amax-compute-algo fp8-amax-history-len fp8-interval fp8-margin fp8-param-gather fp8-quantizer-factory
    fp16-lm-cross-entropy fp32-residual-connection fraction full-validation fused-single-qkv-rope
    grad-reduce-in-bf16 gradient-accumulation-fusion hierarchical-context-parallel-sizes
    high-priority-stream-groups hysteresis img-h img-w init-method-xavier-uniform
    init-model-with-meta-device initial-loss-scale inprocess-restart is-hybrid-model iter-per-epoch
    iterations-to-skip keep-fp8-transpose-cache kv-lora-rank lazy-mpu-init legacy-tokenizer
    linear-attention-type load-main-params-from-ckpt local-rank log-batch-size-to-tensorboard log-energy
    log-loss-scale-to-tensorboard log-max-attention-logit log-memory-to-tensorboard log-num-zeros-in-grad
    log-params-norm log-progress log-straggler log-timers-to-tensorboard log-validation-ppl-to-tensorboard
    log-world-size-to-tensorboard logging-level loss-scale loss-scale-window lr-decay-samples
    lr-warmup-fraction lr-warmup-samples lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style
    main-grads-dtype main-params-dtype manual-gc manual-gc-eval manual-gc-interval mask-factor mask-prob
    mask-type max-tokens-to-oom memory-snapshot-path merge-file
    microbatch-group-size-per-virtual-pipeline-stage mid-level-dataset-surplus min-loss-scale
    mmap-bin-files mock-data model-parallel-size mscale mtp-loss-scaling-factor mtp-num-layers
    multi-latent-attention multiple-validation-sets nccl-all-reduce-for-prefill
    nccl-communicator-config-path nccl-ub no-barrier-with-level-1-timing no-bias-gelu-fusion
    no-bias-swiglu-fusion no-check-for-nan-in-loss-and-grad no-data-sharding no-delay-grad-reduce
    no-fp8-wgrad no-initialization no-log-learnig-rate-to-tensorboard no-log-loss-scale-to-tensorboard
    no-mmap-bin-files no-overlap-p2p-communication no-pin-cpu-grads no-pin-cpu-params
    no-query-key-layer-scaling no-save-optim no-save-rng non-persistent-ckpt-type
    non-persistent-global-ckpt-dir non-persistent-local-ckpt-dir non-persistent-save-interval num-channels
    num-dataset-builder-threads num-distributed-optimizer-instances num-experts
    num-virtual-stages-per-pipeline-rank object-storage-cache-path openai-gelu
    optimizer-cpu-offload optimizer-offload-fraction outer-dp-sharding-strategy output-bert-embeddings
    overlap-moe-expert-parallel-comm overlap-p2p-communication-warmup-flush
    overlap-param-gather-with-optimizer-step patch-dim per-split-data-args-path perform-rl-step
    pipeline-model-parallel-comm-backend pipeline-model-parallel-layout pipeline-model-parallel-split-rank
    precision-aware-optimizer pretrained-checkpoint profile profile-ranks profile-step-end
    profile-step-start q-lora-rank qk-clip qk-head-dim qk-l2-norm qk-layernorm qk-pos-emb-head-dim
    query-in-block-prob rampup-batch-size record-memory-history
    relative-attention-max-distance relative-attention-num-buckets replication replication-factor
    replication-jump rerun-mode reset-attention-mask reset-position-ids result-rejected-tracker-filename
    retriever-report-topk-accuracies retriever-score-scaling retriever-seq-length rope-scaling-factor
    rope-type rotary-interleaved rotary-scaling-factor rotary-seq-len-interpolation-factor
    run-workload-inspector-server sample-rate save-retain-interval sft sgd-momentum sharp-enabled-group
    short-seq-prob skip-train skipped-train-samples softmax-type spec spin-wait squared-relu
    start-weight-decay store-param-remainders straggler-ctrlr-port straggler-minmax-count
    suggested-communication-unit-size te-rng-tracker tensorboard-log-interval tensorboard-queue-size
    test-data-path test-mode tiktoken-num-special-tokens tiktoken-pattern tiktoken-special-tokens
    timing-log-option titles-data-path tokenizer-metadata tokenizer-special-tokens
    torch-fsdp2-reshard-after-forward tp-comm-bootstrap-backend tp-comm-overlap tp-comm-overlap-cfg
    tp-comm-overlap-rs-dgrad train-samples train-sync-interval trust-remote-code use-checkpoint-args
    use-checkpoint-opt-param-scheduler use-cpu-initialization
    use-custom-fsdp use-dist-ckpt-deprecated use-legacy-models use-legacy-static-engine use-megatron-fsdp
    use-mp-args-from-checkpoint-args use-one-sent-docs use-persistent-ckpt-worker
    use-precision-aware-optimizer use-pytorch-profiler use-ring-exchange-p2p use-rope-scaling use-sharp
    use-te-activation-func use-tokenizer-model-from-checkpoint-args use-torch-fsdp2
    use-torch-optimizer-for-cpu-offload use-tp-pp-dp-mapping v-head-dim valid-data-path vocab-extra-ids
    vocab-file vocab-seg-vocab-size wandb-entity warmup weight-decay-incr-style wgrad-deferral-limit
    window-attn-skip-freq window-size yaml-cfg z-loss
    """.split())

UNSUPPORTED_FAMILIES = tuple(f"--{name}-" for name in """
    dino fp4 hybrid ict inference kitchen mamba moe one-logger retro rl swin vision
    """.split())


def is_unsupported(flag: str) -> bool:
    """Whether `flag` is one of Megatron-LM's that we refuse."""
    return flag in UNSUPPORTED or flag.startswith(UNSUPPORTED_FAMILIES)
