"""What an arm of benchmarks/train_step.py runs: its shape, its settings and its fp8."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from models import MODELS, Shape

OPTIONS: dict[str, dict[str, Any]] = {
    "graph": {"enable_cuda_graph": True},
    "no_overlap": {},
    "recompute_mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "recompute_all": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}
"""What may stand behind an implementation, after a +: settings of `TrainConfig`. With `no_overlap` gradients are reduced
and weights gathered after the computing, as with a recording: for a peer that has no memory for more."""


class LeftOut(Exception):
    """This arm cannot be measured here, and why."""


def layers_of(spec: dict[str, Any]) -> str:
    """The arm's --transformer-impl, without the settings behind it."""
    return spec["impl"].split("+")[0]


def shape_of(spec: dict[str, Any]) -> Shape:
    shape = MODELS[spec["model"]]
    return dataclasses.replace(shape, num_layers=spec["layers"] or shape.num_layers)


def run_config(spec: dict[str, Any]) -> Any:
    """The `RunConfig` of an arm. LeftOut for what this tree cannot do, UserError for what cannot run."""
    from megatron.pretrain.checks import settle
    from megatron.pretrain.config import SECTIONS, ModelConfig, from_dict

    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    layers, options = layers_of(spec), spec["impl"].split("+")[1:]
    if layers not in fields["transformer_impl"].metadata["choices"]:
        raise LeftOut(f"this version has no --transformer-impl {layers}")
    shape, tp, dp = shape_of(spec), spec["tp"], spec["dp"]
    model = {name: value for name, value in dataclasses.asdict(shape).items() if name in fields}
    overlapped = dp > 1 and not {"graph", "no_overlap"} & set(options)
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    sections["model"] = {
        **model, "group_query_attention": shape.num_query_groups < shape.num_attention_heads,
        "max_position_embeddings": shape.seq_length, "untie_embeddings_and_output_weights": True,
        "transformer_impl": layers}
    sections["layout"] = {
        "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "use_distributed_optimizer": True,
        "overlap_grad_reduce": overlapped, "overlap_param_gather": overlapped, "distributed_timeout_minutes": 5}
    sections["tokenizer"] = {"tokenizer_type": "NullTokenizer", "vocab_size": shape.vocab_size}
    sections["data"] = {"seq_length": shape.seq_length}
    sections["optim"] = {"lr": 2e-4, "weight_decay": 0.1}
    sections["train"] = {"micro_batch_size": spec["micro_batch"], "train_iters": 1000, "seed": 42, "bf16": True}
    for option in options:
        sections["train"] |= OPTIONS[option]
    _set_fp8(spec, sections, SECTIONS)
    return settle(from_dict(sections), tp * dp)


def _set_fp8(spec: dict[str, Any], sections: dict[str, dict[str, Any]], kinds: dict[str, type]) -> None:
    """Flags of the project's own fp8, for its own layers; the engine's fp8 is set by `engine_fp8`."""
    if spec["recipe"] is None or layers_of(spec) == "transformer_engine":
        return
    home = [name for name, kind in kinds.items()
            if {"fp8_format", "fp8_recipe"} <= {field.name for field in dataclasses.fields(kind)}]
    if layers_of(spec) == "local" or not home:
        raise LeftOut(f"--transformer-impl {spec['impl']} has no fp8")
    sections[home[0]] |= {"fp8_format": "hybrid", "fp8_recipe": spec["recipe"]}


@contextlib.contextmanager
def engine_fp8(spec: dict[str, Any]) -> Iterator[None]:
    """Models of Transformer Engine that are built within compute in the arm's fp8 recipe."""
    from megatron.pretrain.model import build

    plain = build.transformer_config

    def in_fp8(*arguments: Any, **named: Any) -> Any:
        return dataclasses.replace(plain(*arguments, **named), fp8="hybrid", fp8_recipe=spec["recipe"])

    wanted = spec["recipe"] is not None and layers_of(spec) == "transformer_engine"
    build.transformer_config = in_fp8 if wanted else plain
    try:
        yield
    finally:
        build.transformer_config = plain


def check_kernels(spec: dict[str, Any], device_type: str) -> None:
    """Fused layers run without their packages too, by torch: such figures would be taken for theirs."""
    from megatron.pretrain.model.fused.kernels import missing_packages

    if layers_of(spec) == "fused" and device_type == "cuda" and missing_packages():
        raise LeftOut(f"not installed: {', '.join(missing_packages())}")
