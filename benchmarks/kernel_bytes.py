"""Norm, rope, loss and Adam as candidates: what they cost is the memory they move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from kernel_parts import CHECKED_ROWS, Lazy, Part, Setting, first_rows, moved, no_grad
from torch import Tensor
from torch.nn import Parameter, functional


def norm_forward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused import norm

    hidden, weight = setting.random(setting.tokens, setting.shape.hidden_size), _norm_weight(setting)
    left_out: list[str] = []
    quack = {"project: quack": lambda: norm._quack_forward(hidden, weight, 1e-5)[0]}
    return Part("norm forward", 2 * setting.shape.num_layers + 1, 0, moved(hidden, hidden),
                reference=lambda: functional.rms_norm(hidden[:CHECKED_ROWS].double(), weight.shape,
                                                      weight.detach().double(), 1e-5),
                picked=first_rows,
                candidates={"torch": no_grad(lambda: functional.rms_norm(hidden, weight.shape, weight, 1e-5)),
                            "project: torch": no_grad(lambda: norm._torch_forward(hidden, weight, 1e-5)[0]),
                            **setting.having("quack", quack, left_out)}, left_out=left_out)


def norm_backward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused import norm

    hidden, gradient, residual = (setting.random(setting.tokens, setting.shape.hidden_size) for _ in range(3))
    weight = _norm_weight(setting)
    inverse_rms = torch.rsqrt(hidden.float().square().mean(-1) + 1e-5)
    left_out: list[str] = []

    def reference() -> Tensor:
        rows = hidden[:CHECKED_ROWS].double().requires_grad_()
        out = functional.rms_norm(rows, weight.shape, weight.detach().double(), 1e-5)
        return torch.autograd.grad(out, rows, gradient[:CHECKED_ROWS].double())[0] + residual[:CHECKED_ROWS]

    def torch_backward() -> Callable[[], Tensor]:
        leaf = hidden.detach().requires_grad_()
        out = functional.rms_norm(leaf, weight.shape, weight, 1e-5)
        return lambda: torch.autograd.grad(out, (leaf, weight), gradient, retain_graph=True)[0] + residual

    arguments = (hidden, gradient, residual, weight, inverse_rms)
    return Part("norm backward", 2 * setting.shape.num_layers + 1, 0, 4 * moved(hidden), reference,
                picked=first_rows, candidates={"torch": Lazy(torch_backward),
                            "project: torch": no_grad(lambda: norm._torch_backward(*arguments)[0]),
                            **setting.having("quack", {
                                "project: quack": lambda: norm._quack_backward(*arguments)[0]}, left_out)},
                left_out=left_out)


def _norm_weight(setting: Setting) -> Parameter:
    return Parameter(setting.random(setting.shape.hidden_size, scale=0.1) + 1)


def rope(setting: Setting) -> Part:
    shape = setting.shape
    groups, each = shape.num_query_groups, shape.num_attention_heads // shape.num_query_groups
    mixed = setting.random(setting.tokens, 1, groups, each + 2, shape.kv_channels)
    original = mixed.clone()
    frequency = 10000.0 ** -(torch.arange(0, shape.kv_channels, 2, device=setting.device) / shape.kv_channels)
    angles = torch.outer(torch.arange(setting.tokens, device=setting.device), frequency).repeat(1, 2)
    angles = angles[:, None, None].float().contiguous()
    left_out: list[str] = []

    def rotated(rows: Tensor, angle: Tensor) -> Tensor:
        first, second = rows[..., :-1, :].chunk(2, -1)
        cosine, sine = (part.unsqueeze(2).chunk(2, -1)[0] for part in (angle.cos(), angle.sin()))
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def ours() -> Tensor:
        from megatron.pretrain.model.fused.triton_rotary import rotate_

        rotate_(mixed, angles)
        return mixed[..., :-1, :]

    return Part("rope", 2 * shape.num_layers, 0, 2 * moved(mixed[..., :-1, :]),
                reference=lambda: rotated(original[:CHECKED_ROWS].double(), angles[:CHECKED_ROWS].double()),
                picked=first_rows, fresh=lambda: mixed.copy_(original),
                candidates={"torch": lambda: rotated(mixed.float(), angles).bfloat16(),
                            **setting.having("triton", {"project: Triton": ours}, left_out)},
                left_out=left_out)


def loss_forward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused import loss

    logits, labels = _logits(setting)
    left_out: list[str] = []

    def ours(kernel: str) -> Tensor:
        maximum, total, target = loss._module(kernel).statistics(logits, labels, 0)
        return maximum + total.log() - target

    def quack() -> Tensor:
        from quack.cross_entropy import cross_entropy_fwd

        return cross_entropy_fwd(logits, labels, return_lse=True)[0]

    by_torch = partial(functional.cross_entropy, reduction="none")
    triton = {"project: Triton": partial(ours, "triton")}
    return Part("loss forward", 1, 0, moved(logits), picked=first_rows,
                reference=lambda: by_torch(logits[:CHECKED_ROWS].double(), labels[:CHECKED_ROWS]),
                candidates={"torch": lambda: by_torch(logits.float(), labels),
                            "project: torch": partial(ours, "torch"),
                            **setting.having("triton", triton, left_out),
                            **setting.having("quack", {"quack": quack}, left_out)}, left_out=left_out)


def loss_backward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused import loss

    logits, labels = _logits(setting)
    original = logits.clone()
    total = torch.cat([rows.float().logsumexp(-1) for rows in original.split(1024)])
    scale = torch.ones(setting.tokens, device=setting.device)
    left_out: list[str] = []

    def ours(kernel: str) -> Tensor:
        loss._module(kernel).gradient_(logits, labels, 0, total, scale)
        return logits

    def quack() -> Tensor:
        from quack.cross_entropy import cross_entropy_bwd

        return cross_entropy_bwd(original, labels, scale, total)

    def reference() -> Tensor:
        chosen = functional.one_hot(labels[:CHECKED_ROWS], setting.shape.vocab_size)
        return original[:CHECKED_ROWS].double().softmax(-1) - chosen

    triton = {"project: Triton": partial(ours, "triton")}
    return Part("loss backward", 1, 0, 2 * moved(logits), reference, first_rows,
                fresh=lambda: logits.copy_(original),
                candidates={"project: torch": partial(ours, "torch"),
                            **setting.having("triton", triton, left_out),
                            **setting.having("quack", {"quack": quack}, left_out)}, left_out=left_out)


def _logits(setting: Setting) -> tuple[Tensor, Tensor]:
    vocabulary = setting.shape.vocab_size
    return (setting.random(setting.tokens, vocabulary),
            torch.randint(0, vocabulary, (setting.tokens,), device=setting.device))


def adam(setting: Setting) -> Part:
    """The matrices of one MLP as one fp32 tensor."""
    shape = setting.shape
    size = 3 * shape.hidden_size * shape.ffn_hidden_size
    start = torch.randn(size, device=setting.device)
    weight = Parameter(start.clone())
    weight.grad = torch.randn(size, device=setting.device)
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    left_out: list[str] = []

    def reference() -> Tensor:
        leaf = Parameter(start[:CHECKED_ROWS].double())
        leaf.grad = weight.grad[:CHECKED_ROWS].double()
        torch.optim.AdamW([leaf], **options).step()
        return leaf.detach() - start[:CHECKED_ROWS].double()

    def stepping(make: Callable[[], torch.optim.Optimizer]) -> Callable[[], Tensor]:
        def prepare() -> Callable[[], Tensor]:
            optimizer = make()
            return lambda: (optimizer.step(), weight.detach())[1]

        return Lazy(prepare)

    def ours() -> torch.optim.Optimizer:
        from megatron.pretrain.optim.adamw import FusedAdamW

        return FusedAdamW([weight], **options)

    def theirs() -> torch.optim.Optimizer:
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam([weight], adam_w_mode=True, **options)

    total = shape.num_layers * (size + 2 * shape.hidden_size * shape.kv_channels * (
        shape.num_attention_heads + shape.num_query_groups)) + 2 * shape.vocab_size * shape.hidden_size
    return Part("Adam", total / size, 0, 28 * size, reference, fresh=lambda: weight.data.copy_(start),
                picked=lambda new: new[:CHECKED_ROWS].double() - start[:CHECKED_ROWS].double(),
                candidates={"torch fused": stepping(
                                lambda: torch.optim.AdamW([weight], fused=True, **options)),
                            **setting.having("triton", {"project: Triton": stepping(ours)}, left_out),
                            **setting.having("transformer_engine", {"Transformer Engine": stepping(theirs)},
                                             left_out)}, left_out=left_out)
