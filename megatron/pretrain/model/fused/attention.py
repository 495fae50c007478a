"""Self-attention from packed heads: rotation in place, the fastest kernel for each direction, one packed gradient."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional

from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.norm import FusedRMSNorm


class FusedSelfAttention(SelfAttention):
    """The engine's self-attention behind its norm, with the residual added in the output projection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels = kernels_for(self.linear_qkv.weight.device, self.config.params_dtype,
                                   self.hidden_size_per_attention_head, deterministic=self.config.deterministic_mode)

    def forward(self, hidden: Tensor, norm: FusedRMSNorm, angles: Tensor) -> Tensor:
        """hidden [s, b, h] (a shard of s with sequence parallelism), angles [s, 1, 1, d] -> as hidden."""
        mixed, residual = self._packed_heads(hidden, norm)
        if self.kernels.attention == "torch":
            context = torch_rotary_attention(mixed, angles)
        else:
            context = _RotaryAttention.apply(mixed, angles, self.config.deterministic_mode,
                                             self.kernels.attention_backward)
        return self.linear_proj(context, residual)

    def _packed_heads(self, hidden: Tensor, norm: FusedRMSNorm) -> tuple[Tensor, Tensor]:
        """This rank's heads [s, b, groups, query heads of a group + 2, d], and the residual [s, b, h].

        Of each group its queries, its key, its value.
        """
        if self.config.num_query_groups < self.world_size:  # ranks share a group: the engine cuts it for us
            normed, residual = norm.branch(hidden)
            query, key, value = self.get_query_key_value_tensors(normed)
            return torch.cat([query, key, value], dim=2).unsqueeze(2), residual
        mixed, residual = self.linear_qkv.after(norm, hidden)
        heads = self.num_attention_heads_per_partition // self.num_query_groups_per_partition + 2
        return mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, heads, -1), residual


def torch_rotary_attention(mixed: Tensor, angles: Tensor) -> Tensor:
    """Causal attention over mixed [s, b, groups, queries + 2, d] -> [s, b, heads * d], by torch on any device."""
    rotated = _rotated(mixed[..., :-1, :], angles)
    query, key, value = rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], mixed[..., -1, :]
    key, value = (part.repeat_interleave(mixed.size(3) - 2, dim=2) for part in (key, value))
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return context.permute(2, 0, 1, 3).flatten(2)


def _rotated(heads: Tensor, angles: Tensor) -> Tensor:
    """Feature i turns with feature i + d / 2 by angles[..., i], in fp32; see `triton_rotary`."""
    first, second = heads.float().chunk(2, -1)
    angle = angles.float().unsqueeze(2)[..., :first.size(-1)]
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(heads.dtype)


class _RotaryAttention(torch.autograd.Function):
    """Rotates `mixed` in place: it is the projection's output, which nothing else reads."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor, deterministic: bool, backward: str) -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        from megatron.pretrain.model.fused.triton_rotary import rotate_

        rotate_(mixed, angles)
        query, key, value = _split(mixed)
        context = torch.empty(*mixed.shape[:2], query.size(2), query.size(3), dtype=mixed.dtype,
                              device=mixed.device)
        _, statistics, *_ = _flash_attn_fwd(query, key, value, causal=True, return_lse=True,
                                            out=context.transpose(0, 1))
        ctx.save_for_backward(mixed, angles, context, statistics)
        ctx.deterministic, ctx.kernel = deterministic, backward
        return context.flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mixed, angles, context, statistics = ctx.saved_tensors
        d_context = gradient.contiguous().view(context.shape)
        d_mixed = torch.empty_like(mixed)
        made = mixed, context, d_context, statistics, angles, d_mixed
        if ctx.kernel == "project":
            _project_backward(*made)
        elif ctx.kernel == "cuDNN" and mixed.size(0) > 1:    # it refuses a sequence of one position
            _cudnn_backward(*made)
        else:
            _flash_backward(*made, ctx.deterministic)
        return d_mixed, None, None, None


def _split(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, groups, queries + 2, d] -> query [b, s, heads, d], key and value [b, s, groups, d].

    Views, but for queries of several groups with several queries each, which no stride describes.
    """
    parts = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    return tuple(part.transpose(0, 1) for part in parts)


def _flash_backward(mixed: Tensor, context: Tensor, d_context: Tensor, statistics: Tensor, angles: Tensor,
                    d_mixed: Tensor, deterministic: bool) -> None:
    from flash_attn.cute.interface import _flash_attn_bwd

    from megatron.pretrain.model.fused.triton_rotary import pack_rotated_back, rotate_

    parts = d_query, d_key, d_value = _split(d_mixed)
    _flash_attn_bwd(*_split(mixed), context.transpose(0, 1), d_context.transpose(0, 1), statistics, causal=True,
                    deterministic=deterministic, dq=d_query, dk=d_key, dv=d_value)
    if d_query.untyped_storage().data_ptr() == d_mixed.untyped_storage().data_ptr():
        rotate_(d_mixed, angles, inverse=True)
    else:
        pack_rotated_back(*parts, d_mixed, angles)


def _project_backward(mixed: Tensor, context: Tensor, d_context: Tensor, statistics: Tensor, angles: Tensor,
                      d_mixed: Tensor) -> None:
    from megatron.pretrain.model.fused import attention_backward

    attention_backward.backward(*_split(mixed), context.transpose(0, 1), d_context.transpose(0, 1), statistics, angles,
                                d_mixed)


def _cudnn_backward(mixed: Tensor, context: Tensor, d_context: Tensor, statistics: Tensor, angles: Tensor,
                    d_mixed: Tensor) -> None:
    """cuDNN's backward pass from flash-attn-4's result: both keep the natural logarithm of the softmax's sum."""
    from megatron.pretrain.model.fused.triton_rotary import pack_rotated_back

    heads_first = [part.transpose(1, 2) for part in _split(mixed)]
    outer = [part.permute(1, 2, 0, 3) for part in (d_context, context)]
    unused = torch.zeros((), dtype=torch.int64, device=mixed.device)  # of a dropout that there is not
    length = mixed.size(0)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        outer[0], *heads_first, outer[1], statistics.unsqueeze(-1), unused, unused, None, None, None,
        length, length, 0.0, True)
    pack_rotated_back(*(part.transpose(1, 2) for part in gradients), d_mixed, angles)
