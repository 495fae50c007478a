"""Attention as candidates.

Keys at the end are seen by queries at the end alone, so the last rows of all gradients are cheap to check.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_parts import CHECKED_ROWS, Candidates, Lazy, Part, Setting, moved
from torch import Tensor
from torch.nn import functional


def attention_forward(setting: Setting) -> Part:
    query, key, value = _heads(setting)
    left_out: list[str] = []

    def flash() -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        return _flash_attn_fwd(*(part.transpose(1, 2) for part in (query, key, value)), causal=True,
                               return_lse=True)[0].transpose(1, 2)

    candidates = {"torch": partial(_sdpa, query, key, value)}
    if setting.on_gpu:
        candidates["cuDNN"] = lambda: _cudnn_forward(query, key, value)[0]
    return Part("attention forward", setting.shape.num_layers, _attention_flops(setting, 2),
                moved(query, query, key, value), reference=lambda: _reference_attention(query, key, value),
                picked=lambda out: out[:, :, -CHECKED_ROWS:],
                candidates=candidates | setting.having("flash_attn.cute", {"flash-attn-4": flash}, left_out),
                left_out=left_out)


def attention_backward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused import attention
    from megatron.pretrain.model.fused.kernels import PROJECT_BACKWARD_HEAD_DIMS, kernels_for

    query, key, value = _heads(setting)
    gradient = setting.random(setting.tokens, 1, *query.shape[1::2]).permute(1, 2, 0, 3)
    left_out: list[str] = []
    candidates: Candidates = {"torch": _torch_backward(query, key, value, gradient)}
    if setting.on_gpu:
        candidates["cuDNN"] = Lazy(partial(_cudnn_backward, query, key, value, gradient))
    flash = {"flash-attn-4": Lazy(partial(_flash_backward, query, key, value, gradient))}
    # The ways of the fused layers turn heads back as well: where one is the fastest, "rope" counts twice.
    width = setting.shape.kv_channels
    chosen = kernels_for(setting.device, torch.bfloat16, width).attention_backward
    ways = {"flash-attn-4": partial(attention._flash_backward, deterministic=False), "cuDNN": attention._cudnn_backward}
    if width in PROJECT_BACKWARD_HEAD_DIMS:
        ways["project"] = attention._project_backward
    for name, way in ways.items():
        flash[f"{'project: ' if name == chosen else ''}{name}, rotated"] = Lazy(
            partial(_rotated_backward, setting, query, key, value, gradient, way))

    def last_rows(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.cat([part[:, :, -CHECKED_ROWS:].flatten().double() for part in gradients])

    return Part("attention backward", setting.shape.num_layers, _attention_flops(setting, 5),
                2 * moved(query, query, key, value), picked=last_rows,
                reference=lambda: last_rows(_reference_attention(query, key, value, gradient)),
                candidates=candidates | setting.having("flash_attn.cute", flash, left_out), left_out=left_out)


def _heads(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, heads, s, d] as views of tensors [s, 1, heads, d], the engine's order."""
    shape = setting.shape
    counts = (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    return tuple(setting.random(setting.tokens, 1, count, shape.kv_channels).permute(1, 2, 0, 3)
                 for count in counts)


def _attention_flops(setting: Setting, products: int) -> float:
    """Of so many products with the lower half of a square of scores."""
    shape = setting.shape
    return products * setting.tokens ** 2 * shape.num_attention_heads * shape.kv_channels


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shared = query.size(1) // key.size(1)
    key, value = (part.repeat_interleave(shared, 1) for part in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _torch_backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Callable[[], Any]:
    def prepare() -> Callable[[], Any]:
        leaves = [part.detach().requires_grad_() for part in (query, key, value)]
        out = _sdpa(*leaves)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return Lazy(prepare)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, False)


def _cudnn_backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Callable[[], Any]:
    out, statistics, _, _, _, _, seed, offset, _ = _cudnn_forward(query, key, value)
    length = query.size(2)
    return lambda: torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient, query, key, value, out, statistics, seed, offset, None, None, None, length, length, 0.0,
        True)


def _flash_backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> Callable[[], Any]:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    heads = [part.transpose(1, 2) for part in (query, key, value)]
    out, statistics, *_ = _flash_attn_fwd(*heads, causal=True, return_lse=True)
    outer = gradient.transpose(1, 2).contiguous()
    return lambda: tuple(part.transpose(1, 2) for part in _flash_attn_bwd(
        *heads, out, outer, statistics, causal=True)[:3])


def _rotated_backward(setting: Setting, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor,
                      backward: Callable[..., None]) -> Callable[[], Any]:
    """From packed heads and flash-attn-4's result to a packed gradient, turned by angles of nought."""
    from flash_attn.cute.interface import _flash_attn_fwd

    from megatron.pretrain.model.fused import attention

    shape = setting.shape
    groups, each = shape.num_query_groups, shape.num_attention_heads // shape.num_query_groups
    # [1, heads, s, d] -> [s, 1, groups, heads of a group, d]
    queries, keys, values = (part.permute(2, 0, 1, 3).unflatten(2, (groups, -1))
                             for part in (query, key, value))
    mixed = torch.cat([queries, keys, values], 3)
    context = torch.empty(setting.tokens, 1, groups * each, shape.kv_channels, dtype=mixed.dtype,
                          device=mixed.device)
    _, statistics, *_ = _flash_attn_fwd(*attention._split(mixed), causal=True, return_lse=True,
                                        out=context.transpose(0, 1))
    d_context = gradient.permute(2, 0, 1, 3).contiguous()
    angles = torch.zeros(setting.tokens, 1, 1, shape.kv_channels, device=mixed.device)

    def run() -> tuple[Tensor, ...]:
        d_mixed = torch.empty_like(mixed)
        backward(mixed, context, d_context, statistics, angles, d_mixed)
        return tuple(part.transpose(1, 2) for part in attention._split(d_mixed))

    return run


def _reference_attention(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor | None = None) -> Any:
    """The last rows of the result in fp64; with its gradient, the gradients, right in their last rows."""
    leaves = [part.detach().double().requires_grad_() for part in (query[:, :, -CHECKED_ROWS:], key, value)]
    rows, length = leaves[0].size(2), key.size(2)
    shared = query.size(1) // key.size(1)
    keys, values = (part.repeat_interleave(shared, 1) for part in leaves[1:])
    scores = leaves[0] @ keys.transpose(-1, -2) / query.size(-1) ** 0.5
    hidden = torch.ones(rows, length, dtype=torch.bool, device=query.device).triu(length - rows + 1)
    out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
    if gradient is None:
        return out.detach()
    return torch.autograd.grad(out, leaves, gradient[:, :, -CHECKED_ROWS:].double())
