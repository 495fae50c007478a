"""Grouped-query attention's backward pass for heads of 256 on Hopper: flash-attn-4's kernel with larger tiles.

A tile of queries meets a tile of keys, and its part of the queries' gradient, 64 x 256 in fp32, is added to global
memory. flash-attn-4 keeps 64 KB of shared memory for parts on their way, beside which 48 keys fit. Here a part leaves
in quarters: three through 48 KB of shared memory by the TMA unit, the last from the threads' registers, which another
unit adds. So 64 keys fit, a quarter fewer parts are added, both units work, and only tiles on the diagonal are masked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cutlass
import torch
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from flash_attn.cute import interface, utils
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.copy_utils import atomic_add_fp32x4
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.named_barrier import NamedBarrierBwd
from quack import copy_utils, layout_utils, sm90_utils
from torch import Tensor

HEAD_DIM = 256
TILE = 64
"""Queries and keys of a tile; equal, so that of a tile of keys one tile of queries is cut by the diagonal."""
QUARTERS = 4
STAGED_QUARTERS = 3
VECTOR = 4
"""fp32 values that a thread stores or adds at once."""
WARPGROUP_THREADS = 128
WARPGROUPS = 2
HANDED_OVER = WARPGROUP_THREADS + cute.arch.WARP_SIZE
"""Threads at a barrier between a warpgroup and the warp that sends what it staged."""

_compiled = get_jit_cache("neo_wide_backward")
_source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def backward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, d_out: Tensor, statistics: Tensor,
             into: tuple[Tensor, Tensor, Tensor]) -> None:
    """The gradients of causal self-attention, written to `into`: query, key, value.

    query, out, d_out [b, s, heads, 256] and key, value [b, s, groups, 256], fewer groups than heads, in 16 bits, the
    last dimension contiguous; statistics [b, heads, s] fp32, the natural logarithms of the softmax's sums. Sums are in
    fp32, in no fixed order.
    """
    (batch, length, heads, width), groups = query.shape, key.size(2)
    if width != HEAD_DIM or heads == groups:
        raise ValueError(f"heads that share keys and are {HEAD_DIM} wide, not {heads} of {width} with {groups} groups")
    dtype, scale = interface.torch2cute_dtype_map[query.dtype], width ** -0.5
    rounded = -(-length // TILE) * TILE
    sums = partial(torch.empty, dtype=torch.float32, device=query.device)
    d_query, output_sums, logarithms = sums(batch, heads, rounded * width), *sums(2, batch, heads, rounded)
    interface._bwd_preprocess(out, d_out, output_sums, statistics, logarithms, d_query, None, None, None, dtype, width,
                              width, TILE, hdim_multiple_of=32, fake_mode=False)
    # The heads of a group add up.
    d_key, d_value = torch.zeros(2, batch, groups, rounded * width, dtype=torch.float32, device=query.device)
    _kernel(dtype, heads // groups)(query, key, value, d_out, logarithms, output_sums, d_query, d_key, d_value, scale,
                                    *(None,) * 9, utils.AuxData(None, None), None, None)
    deliver = partial(interface._bwd_postprocess_convert, fake_mode=False)
    layout = (None, None, 90, dtype, width, TILE, WARPGROUPS * WARPGROUP_THREADS, 1, False)
    for total, gradient, factor in zip((d_query, d_key, d_value), into, (scale, scale, 1.0), strict=True):
        deliver(total, gradient, factor, *layout)


def _kernel(dtype: type[cutlass.Numeric], heads_of_group: int) -> Any:
    """The compiled kernel, from flash-attn-4's cache of compiled kernels if the user has it kept."""
    key = (_source, str(dtype), heads_of_group)
    if key not in _compiled:
        query, key_, value, _, d_out, _, _, _, _, logarithms, output_sums, d_query, d_key, d_value, _ = (
            interface.make_fake_bwd_tensors(dtype, has_gqa=True, varlen_q=False, varlen_k=False))
        _compiled[key] = cute.compile(
            WideBackward(dtype, heads_of_group), query, key_, value, d_out, logarithms, output_sums, d_query, d_key,
            d_value, Float32(1.0), *(None,) * 9, utils.AuxData(None, None), None, None,
            cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True), options="--enable-tvm-ffi")
    return _compiled[key]


class WideBackward(FlashAttentionBackwardSm90):
    """Two warpgroups compute, one warp loads, as there; what they do with a tile is ours."""

    def __init__(self, dtype: type[cutlass.Numeric], heads_of_group: int) -> None:
        super().__init__(dtype, HEAD_DIM, HEAD_DIM, heads_of_group, is_causal=True, tile_m=TILE, tile_n=TILE,
                         Q_stage=2, dO_stage=1, PdS_stage=1, AtomLayoutMSdP=1, AtomLayoutNdKV=1, AtomLayoutMdQ=1,
                         num_threads=(WARPGROUPS + 1) * WARPGROUP_THREADS)
        self.quarter = TILE * HEAD_DIM // WARPGROUPS // QUARTERS
        """fp32 values of a warpgroup."""

    def _setup_attributes(self) -> None:
        super()._setup_attributes()
        self.sdQaccum_layout = cute.make_layout((self.quarter, STAGED_QUARTERS, WARPGROUPS))

    def _parts(self, sums: cute.Tensor, head: Int32, batch: Int32, tiles: Int32) -> cute.Tensor:
        """A head's gradient of the queries in global memory, [values, quarter, warpgroup, tile]."""
        return cute.make_tensor(sums[None, head, batch].iterator,
                                cute.make_layout((self.quarter, QUARTERS, WARPGROUPS, tiles)))

    @cute.jit
    def dQaccum_store(self, sums: cute.Tensor, staged: cute.Tensor, block_info: Any, scheduler: Any, lengths: Any,
                      blocksparse_tensors: Any = None, mdQ_semaphore: Any = None) -> None:
        """One warp: add to global memory what the warpgroups stage."""
        keys, head, batch, _ = scheduler().initial_work_tile_info().tile_idx
        first, end = block_info.get_m_block_min_max(lengths(batch), keys)
        parts = self._parts(sums, head, batch, end)
        for queries in cutlass.range(first, end, unroll=1):
            for quarter in cutlass.range_constexpr(STAGED_QUARTERS):
                for group in cutlass.range_constexpr(WARPGROUPS):
                    # Of what was sent since, that much may still be read: not what this place held.
                    cute.arch.cp_async_bulk_wait_group(WARPGROUPS * STAGED_QUARTERS - 1 - group, read=True)
                    cute.arch.barrier_arrive(barrier_id=NamedBarrierBwd.dQEmptyWG0 + group,
                                             number_of_threads=HANDED_OVER)
                for group in cutlass.range_constexpr(WARPGROUPS):
                    cute.arch.barrier(barrier_id=NamedBarrierBwd.dQFullWG0 + group, number_of_threads=HANDED_OVER)
                    with cute.arch.elect_one():
                        copy_utils.cpasync_reduce_bulk_add_f32(
                            staged[None, quarter, group].iterator, parts[None, quarter, group, queries].iterator,
                            self.quarter * Float32.width // 8)
                    cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def mma(self, product_SdP: Any, product_dK: Any, product_dV: Any, product_dQ: Any, mdK: cute.Tensor,
            mdV: cute.Tensor, mdK_semaphore: Any, mdV_semaphore: Any, sums: cute.Tensor, sQ: cute.Tensor,
            sK: cute.Tensor, sV: cute.Tensor, sdO: cute.Tensor, sP: cute.Tensor, sdS: cute.Tensor, sLSE: cute.Tensor,
            sdPsum: cute.Tensor, staged: cute.Tensor, queries_ready: Any, outputs_ready: Any, thread: Int32,
            tma_dK: Any, tma_dV: Any, staging: Any, scale_log2: Float32, scale: Float32, block_info: Any, lengths: Any,
            masks: Any, scheduler: Any, aux_data: Any = None, fastdiv_mods: Any = None, blocksparse_tensors: Any = None,
            heads_divisor: Any = None, is_dQ_wg: cutlass.Constexpr[bool] = True) -> None:
        """The two warpgroups: all tiles of queries that see a tile of keys, then the gradients of these."""
        group = cute.arch.make_warp_uniform(thread // WARPGROUP_THREADS)
        keys, head, batch, _ = scheduler().initial_work_tile_info().tile_idx
        seqlen = lengths(batch)
        first, end = block_info.get_m_block_min_max(seqlen, keys)

        def operands(product: Any, left: cute.Tensor, right: cute.Tensor, *shape: int) -> tuple[Any, Any, Any]:
            """The sum, and the two factors in shared memory, of this warpgroup."""
            mine = product.get_slice(cute.make_layout(WARPGROUPS, stride=WARPGROUP_THREADS)(group))
            return sm90_utils.partition_fragment_ABC(mine, shape, left, right)

        def stored(to: cute.Tensor) -> Any:
            return copy_utils.get_smem_store_C(product_SdP, to, thread, position_independent=True,
                                               major_mode_size=TILE // WARPGROUPS)[0]

        def of_rows(values: cute.Tensor) -> cute.Tensor:
            return layout_utils.mma_partition_C_vec(values, product_SdP.get_slice(thread), expand_shape=TILE,
                                                    is_colvec=True)

        transposed = layout_utils.transpose_view
        dV, *factors_dV = operands(product_dV, transposed(sP), transposed(sdO), TILE, HEAD_DIM, TILE)
        dK, *factors_dK = operands(product_dK, transposed(sdS), transposed(sQ), TILE, HEAD_DIM, TILE)
        dV.fill(0.0)
        dK.fill(0.0)
        fresh, added = sm90_utils.gemm_zero_init, partial(sm90_utils.gemm_w_idx, zero_init=False)
        step = _Step(
            scores=partial(fresh, product_SdP, (TILE, TILE), *operands(product_SdP, sQ, sK, TILE, TILE, HEAD_DIM)[1:]),
            d_weights=partial(fresh, product_SdP, (TILE, TILE),
                              *operands(product_SdP, sdO, sV, TILE, TILE, HEAD_DIM)[1:]),
            d_queries=partial(fresh, product_dQ, (TILE, HEAD_DIM),
                              *operands(product_dQ, sdS, transposed(sK), TILE, HEAD_DIM, TILE)[1:]),
            add_to_values=partial(added, product_dV, dV, *factors_dV),
            add_to_keys=partial(added, product_dK, dK, *factors_dK),
            mask=partial(masks(seqlen).apply_mask, batch_idx=batch, head_idx=head, n_block=keys,
                         thr_mma=product_SdP.get_slice(thread), mask_seqlen=True, mask_causal=True),
            store_weights=stored(sP), store_d_scores=stored(sdS), logarithms=of_rows(sLSE), output_sums=of_rows(sdPsum),
            scale_log2=scale_log2, dtype=self.dtype, queries_ready=queries_ready, outputs_ready=outputs_ready,
            both=pipeline.NamedBarrier(barrier_id=int(NamedBarrierBwd.PdS),
                                       num_threads=WARPGROUPS * WARPGROUP_THREADS),
            thread=thread % WARPGROUP_THREADS, group=group, staged=staged, parts=self._parts(sums, head, batch, end))
        state_Q, state_dO = (pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
                             for stages in (self.Q_stage, self.dO_stage))
        step.take(first, state_Q, state_dO, on_diagonal=True)
        for queries in cutlass.range(first + 1, end, unroll=1):
            state_Q.advance()
            state_dO.advance()
            step.take(queries, state_Q, state_dO, on_diagonal=False)
        self.epilogue_dKV(dV, mdV, sV, dK, mdK, sK, seqlen, tma_dK, tma_dV, product_dK, product_dV, thread, keys, head,
                          batch, heads_divisor, mdK_semaphore, mdV_semaphore)
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@dataclass(frozen=True)
class _Step:
    """What a warpgroup needs to take a tile of queries: products and stores bound to what they work on."""

    scores: Any
    d_weights: Any
    d_queries: Any
    add_to_values: Any
    add_to_keys: Any
    mask: Any
    store_weights: Any
    store_d_scores: Any
    logarithms: cute.Tensor
    output_sums: cute.Tensor
    scale_log2: Float32
    dtype: type[cutlass.Numeric]
    queries_ready: Any
    outputs_ready: Any
    both: pipeline.NamedBarrier
    thread: Int32
    group: Int32
    staged: cute.Tensor
    parts: cute.Tensor

    def take(self, queries: Int32, state_Q: Any, state_dO: Any, *, on_diagonal: bool) -> None:
        """P = exp(S - l), dS = P (dP - D) for S = Q K^T, dP = dO V^T; dV += P^T dO, dK += dS^T Q, and dQ = dS K.

        FlashAttention-2 (Dao, 2023), algorithm 2. The products run beside what follows them until they are waited
        for: dP beside the exponentials, dV beside the store of dS, dK beside dQ's way out.
        """
        self.queries_ready.consumer_wait(state_Q, self.queries_ready.consumer_try_wait(state_Q))
        scores = self.scores(A_idx=state_Q.index)
        logarithms = copy_utils.load_s2r(self.logarithms[None, state_Q.index])
        self.outputs_ready.consumer_wait(state_dO, self.outputs_ready.consumer_try_wait(state_dO))
        d_scores = self.d_weights(A_idx=0, wg_wait=1)
        if on_diagonal:
            self.mask(scores, m_block=queries)
        weights = layout_utils.reshape_acc_to_mn(scores)
        rows, columns = (cute.size(weights, mode=[mode]) for mode in (0, 1))
        for row in range(rows):
            for column in range(columns):
                weights[row, column] = cute.math.exp2(weights[row, column] * self.scale_log2 - logarithms[row],
                                                      fastmath=True)
        output_sums = copy_utils.load_s2r(self.output_sums[None, 0])
        self.both.arrive_and_wait()    # the other warpgroup's products have read the tile before
        self.store_weights(utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), self.dtype), dst_idx=0)
        warpgroup.wait_group(0)
        d_weights = layout_utils.reshape_acc_to_mn(d_scores)
        for row in range(rows):
            for column in range(columns):
                d_weights[row, column] = weights[row, column] * (d_weights[row, column] - output_sums[row])
        self._stored_by_both()
        self.store_d_scores(utils.cvt_f16(layout_utils.reshape_acc_to_frgA(d_scores), self.dtype), dst_idx=0)
        self.add_to_values(A_idx=0, B_idx=0)
        self._stored_by_both()
        d_queries = self.d_queries(A_idx=0, wg_wait=1)
        self.outputs_ready.consumer_release(state_dO)
        self.add_to_keys(A_idx=0, B_idx=state_Q.index, wg_wait=1)
        self._send(d_queries, queries)
        warpgroup.wait_group(0)
        self.queries_ready.consumer_release(state_Q)

    def _stored_by_both(self) -> None:
        cute.arch.fence_view_async_shared()
        self.both.arrive_and_wait()

    def _send(self, d_queries: cute.Tensor, queries: Int32) -> None:
        """Add a part to global memory, its values in the order in which the threads have them."""
        vectors = cute.size(d_queries) // VECTOR // QUARTERS
        mine = cute.make_tensor(d_queries.iterator, cute.make_layout((VECTOR, vectors, QUARTERS)))
        for quarter in range(STAGED_QUARTERS):
            place = cute.make_tensor(self.staged[None, quarter, self.group].iterator,
                                     cute.make_layout((VECTOR, WARPGROUP_THREADS, vectors)))
            cute.arch.barrier(barrier_id=NamedBarrierBwd.dQEmptyWG0 + self.group, number_of_threads=HANDED_OVER)
            cute.autovec_copy(mine[None, None, quarter], place[None, self.thread, None])
            cute.arch.fence_view_async_shared()
            cute.arch.barrier_arrive(barrier_id=NamedBarrierBwd.dQFullWG0 + self.group, number_of_threads=HANDED_OVER)
        for quarter in range(STAGED_QUARTERS, QUARTERS):
            to = self.parts[None, quarter, self.group, queries].iterator + self.thread * VECTOR
            for vector in range(vectors):
                atomic_add_fp32x4(*(mine[value, vector, quarter] for value in range(VECTOR)),
                                  to + vector * VECTOR * WARPGROUP_THREADS)
