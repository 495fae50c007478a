"""Attention's backward pass on Hopper by the project's kernel: from heads to their packed gradient, turned back."""

from __future__ import annotations

from functools import partial

import torch
from flash_attn.cute import interface, utils
from torch import Tensor

from megatron.pretrain.model.fused.attention_backward_kernel import QUERIES, TILINGS, WARPGROUP_THREADS, compiled
from megatron.pretrain.model.fused.triton_rotary import pack_sums, rotate_


def backward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, d_out: Tensor, statistics: Tensor, angles: Tensor,
             d_mixed: Tensor) -> None:
    """The gradients of causal self-attention, written to d_mixed [s, b, groups, queries + 2, d], turned back by angles.

    query, out, d_out [b, s, heads, d] and key, value [b, s, groups, d] in 16 bits, d of `TILINGS`, the last dimension
    contiguous; statistics [b, heads, s] fp32, the natural logarithms of the softmax's sums; angles [s, 1, 1, d] fp32,
    by which query and key were rotated; d_mixed is contiguous. Sums are in fp32, in no fixed order; dS is of P in
    16 bits. ValueError for another d.
    """
    (batch, length, heads, width), groups = query.shape, key.size(2)
    if width not in TILINGS:
        raise ValueError(f"heads of {' or '.join(map(str, TILINGS))}, not {width}")
    tiling, each = TILINGS[width], heads // groups
    dtype, scale = interface.torch2cute_dtype_map[query.dtype], width ** -0.5
    sums = partial(torch.empty, dtype=torch.float32, device=query.device)
    query_rows, key_rows = (-(-length // tile) * tile for tile in (QUERIES, tiling.keys))
    d_query, output_sums, logarithms = sums(batch, heads, query_rows * width), *sums(2, batch, heads, query_rows)
    into = tuple(d_mixed[..., slot, :].transpose(0, 1) for slot in (-2, -1))
    # The heads of a group add up.
    d_key, d_value = into if each == 1 else sums(2, batch, groups, key_rows * width).zero_()
    interface._bwd_preprocess(out, d_out, output_sums, statistics, logarithms, d_query, None, None, None, dtype, width,
                              width, QUERIES, fake_mode=False)
    compiled(dtype, width, each)(query, key, value, d_out, logarithms, output_sums, d_query, d_key, d_value, scale,
                                 *(None,) * 9, utils.AuxData(None, None), None, None)
    pack_sums(d_query, d_mixed, 0, scale, angles)
    if each > 1 and not tiling.transposed:
        pack_sums(d_key, d_mixed, each, scale, angles)
        pack_sums(d_value, d_mixed, each + 1, 1.0)
        return
    if each > 1:
        deliver = partial(interface._bwd_postprocess_convert, hdim_multiple_of=64, fake_mode=False)
        for total, gradient, factor in ((d_key, into[0], scale), (d_value, into[1], 1.0)):
            deliver(total, gradient, factor, None, None, 90, dtype, width, tiling.keys, WARPGROUP_THREADS, 1, True)
    rotate_(d_mixed, angles, inverse=True, keys_only=True)
