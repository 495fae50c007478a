"""The kernel of attention's backward pass on Hopper: flash-attn-4's, each of its two warpgroups with its own products.

For a tile of queries and one of keys: S = Q K^T, P = exp(S - l), dP = dO V^T, dS = P (dP - D); dV += P^T dO,
dK += dS^T Q and dQ += dS K (FlashAttention-2, Dao 2023, algorithm 2). In flash-attn-4 both warpgroups take half of
every product, in step. Here one takes S and dV, the other dP and dK, and each half of dQ: P and dS go from one to the
other through shared memory. A whole product reads a quarter less of shared memory than its halves in two warpgroups,
and shared memory bounds this pass; and one warpgroup computes exponentials while the other multiplies.

dQ is added up in global memory, in fp32. A tile's part of it leaves a warpgroup on two ways: as much as fits through
shared memory by the TMA unit, the rest from the threads' registers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import LayoutEnum, hopper_helpers
from flash_attn.cute import interface, utils
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.copy_utils import atomic_add_fp32x4
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.named_barrier import NamedBarrierBwd
from quack import copy_utils, layout_utils, sm90_utils


@dataclass(frozen=True)
class Tiling:
    """How a head dimension is cut."""

    keys: int
    """Keys of a tile."""
    transposed: bool
    """Whether dK and dV are computed as their transposes: for tiles that are no multiple of 64 keys."""
    parts: int
    """Equal parts of a warpgroup's half of dQ."""
    staged_parts: int
    """Of these, what leaves through shared memory: as many as fit."""


TILINGS = {192: Tiling(keys=96, transposed=True, parts=3, staged_parts=2),
           256: Tiling(keys=64, transposed=False, parts=4, staged_parts=2)}
QUERIES = 64
"""Of a tile."""
VECTOR = 4
"""fp32 values that a thread stores or adds at once."""
WARPGROUP_THREADS = 128
BOTH_THREADS = 2 * WARPGROUP_THREADS
STAGING_THREADS = WARPGROUP_THREADS + cute.arch.WARP_SIZE
"""At a barrier between a warpgroup and the warp that sends what it staged."""

# Barriers, by numbers that flash-attn-4 leaves free in this kernel; pairs are for tiles of even and of odd number.
WEIGHTS_STORED = 2
OF_ONE_WARPGROUP = 4
SCORES_STORED = 12
SCORES_READ = 14

_compiled = get_jit_cache("neo_attention_backward")
_source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def compiled(dtype: type[cutlass.Numeric], width: int, heads_of_group: int) -> Any:
    """The compiled kernel, from flash-attn-4's cache of compiled kernels if the user has it kept."""
    key = (_source, str(dtype), width, heads_of_group)
    if key not in _compiled:
        query, key_, value, _, d_out, _, *gradients, _, logarithms, output_sums, d_query, d_key, d_value, _ = (
            interface.make_fake_bwd_tensors(dtype, has_gqa=heads_of_group > 1, varlen_q=False, varlen_k=False))
        if heads_of_group == 1:
            d_key, d_value = gradients
        _compiled[key] = cute.compile(
            AttentionBackward(dtype, width, heads_of_group), query, key_, value, d_out, logarithms, output_sums,
            d_query, d_key, d_value, Float32(1.0), *(None,) * 9, utils.AuxData(None, None), None, None,
            cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True), options="--enable-tvm-ffi")
    return _compiled[key]


class AttentionBackward(FlashAttentionBackwardSm90):
    """What loads tiles is flash-attn-4's; what the warpgroups do with them is ours."""

    def __init__(self, dtype: type[cutlass.Numeric], width: int, heads_of_group: int) -> None:
        self.tiling = TILINGS[width]
        # With dKV_swapAB rows are features, of which a warpgroup there would have half: it shapes the layouts alone.
        super().__init__(dtype, width, width, heads_of_group, is_causal=True, tile_m=QUERIES, tile_n=self.tiling.keys,
                         Q_stage=2, dO_stage=1, PdS_stage=2, dKV_swapAB=self.tiling.transposed, AtomLayoutMSdP=1,
                         AtomLayoutNdKV=2 if self.tiling.transposed else 1, AtomLayoutMdQ=1,
                         num_threads=BOTH_THREADS + WARPGROUP_THREADS)
        self.part = QUERIES * width // 2 // self.tiling.parts
        """fp32 values."""

    def _setup_attributes(self) -> None:
        super()._setup_attributes()
        self.sPdS_layout = sm90_utils.make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, (QUERIES, self.tile_n),
                                                       stage=self.PdS_stage, major_mode_size=self.tile_n)
        self.sdQaccum_layout = cute.make_layout((self.part * self.tiling.staged_parts, 2))

    def _parts(self, sums: cute.Tensor, head: Int32, batch: Int32, tiles: Int32) -> cute.Tensor:
        """A head's dQ in global memory, [values, part, warpgroup, tile]."""
        return cute.make_tensor(sums[None, head, batch].iterator,
                                cute.make_layout((self.part, self.tiling.parts, 2, tiles)))

    @cute.jit
    def dQaccum_store(self, sums: cute.Tensor, staged: cute.Tensor, block_info: Any, scheduler: Any, lengths: Any,
                      blocksparse_tensors: Any = None, mdQ_semaphore: Any = None) -> None:
        """One warp: add to global memory what the warpgroups stage."""
        key_tile, head, batch, _ = scheduler().initial_work_tile_info().tile_idx
        first, end = block_info.get_m_block_min_max(lengths(batch), key_tile)
        parts = self._parts(sums, head, batch, end)
        for tile in cutlass.range(first, end, unroll=1):
            for group in cutlass.range_constexpr(2):
                cute.arch.cp_async_bulk_wait_group(1 - group, read=True)    # this group's last, not the other's
                cute.arch.barrier_arrive(barrier_id=NamedBarrierBwd.dQEmptyWG0 + group,
                                         number_of_threads=STAGING_THREADS)
            for group in cutlass.range_constexpr(2):
                cute.arch.barrier(barrier_id=NamedBarrierBwd.dQFullWG0 + group, number_of_threads=STAGING_THREADS)
                with cute.arch.elect_one():
                    copy_utils.cpasync_reduce_bulk_add_f32(
                        staged[None, group].iterator, parts[None, 0, group, tile].iterator,
                        self.part * self.tiling.staged_parts * Float32.width // 8)
                cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def mma(self, product_SdP: Any, product_dK: Any, product_dV: Any, product_dQ: Any, mdK: cute.Tensor,
            mdV: cute.Tensor, mdK_semaphore: Any, mdV_semaphore: Any, sums: cute.Tensor, sQ: cute.Tensor,
            sK: cute.Tensor, sV: cute.Tensor, sdO: cute.Tensor, sP: cute.Tensor, sdS: cute.Tensor, sLSE: cute.Tensor,
            sdPsum: cute.Tensor, staged: cute.Tensor, Q_ready: Any, dO_ready: Any, thread: Int32, tma_dK: Any,
            tma_dV: Any, staging: Any, scale_log2: Float32, scale: Float32, block_info: Any, lengths: Any, masks: Any,
            scheduler: Any, aux_data: Any = None, fastdiv_mods: Any = None, blocksparse_tensors: Any = None,
            heads_divisor: Any = None, is_dQ_wg: cutlass.Constexpr[bool] = True) -> None:
        """The two warpgroups: all tiles of queries that see a tile of keys, then the gradients of these."""
        key_tile, head, batch, _ = scheduler().initial_work_tile_info().tile_idx
        seqlen, mine = lengths(batch), thread % WARPGROUP_THREADS
        first, end = block_info.get_m_block_min_max(seqlen, key_tile)
        over_features, over_queries = _products(self.dtype, self.tile_n,
                                                self.tile_n if self.tiling.transposed else self.tile_hdim)
        tools = _Tools(keys=self.tile_n, features=self.tile_hdim, tiling=self.tiling, over_features=over_features,
                       over_queries=over_queries, product_dQ=product_dQ, thread=mine, staged=staged,
                       parts=self._parts(sums, head, batch, end))
        state_Q, state_dO = (pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
                             for stages in (self.Q_stage, self.dO_stage))
        mask = partial(masks(seqlen).apply_mask, batch_idx=batch, head_idx=head, n_block=key_tile,
                       thr_mma=over_features.get_slice(mine), mask_seqlen=True, mask_causal=True)
        seen_whole = ((key_tile + 1) * self.tile_n - 1 + QUERIES - 1) // QUERIES
        deliver = partial(self._deliver, tools, seqlen, key_tile, head, batch, heads_divisor)
        if cute.arch.make_warp_uniform(thread // WARPGROUP_THREADS) == 0:
            dV = self._values(tools, first, end, sQ, sK, sdO, sP, sdS, sLSE, Q_ready, dO_ready, state_Q, state_dO,
                              scale_log2, mask, seen_whole)
            deliver(dV, mdV, sV, tma_dV, 0)
        else:
            dK = self._keys(tools, first, end, sQ, sK, sV, sdO, sP, sdS, sdPsum, Q_ready, dO_ready, state_Q, state_dO)
            if const_expr(self.qhead_per_kvhead == 1):
                dK.store(dK.load() * scale)
            deliver(dK, mdK, sK, tma_dK, 1)

    @cute.jit
    def _values(self, tools: Any, first: Int32, end: Int32, sQ: cute.Tensor, sK: cute.Tensor, sdO: cute.Tensor,
                sP: cute.Tensor, sdS: cute.Tensor, sLSE: cute.Tensor, Q_ready: Any, dO_ready: Any, state_Q: Any,
                state_dO: Any, scale_log2: Float32, mask: Any, seen_whole: Int32) -> Any:
        """The first warpgroup: P and half of dQ of every tile; returns dV."""
        dV, add = tools.sum_over_queries(sP, sdO)
        half = tools.half_of_dQ(0, sdS, sK)
        scores, logarithms = tools.product(sQ, sK), tools.of_rows(sLSE)
        weights = partial(self._weights, tools.store(sP), scale_log2, mask, seen_whole)
        Q_ready.consumer_wait(state_Q)
        S = scores(A_idx=state_Q.index, wg_wait=0)
        rows = copy_utils.load_s2r(logarithms[None, state_Q.index])
        Q_ready.consumer_release(state_Q)
        weights(S, rows, first, 0)
        for tile in cutlass.range(first, end - 1, unroll=1):
            place = (tile - first) % 2
            state_Q.advance()
            Q_ready.consumer_wait(state_Q, Q_ready.consumer_try_wait(state_Q))
            S = scores(A_idx=state_Q.index, wg_wait=-1)    # the next tile's, so that its P is there in time
            rows = copy_utils.load_s2r(logarithms[None, state_Q.index])
            dO_ready.consumer_wait(state_dO, dO_ready.consumer_try_wait(state_dO))
            add(A_idx=place, B_idx=0, wg_wait=1)
            Q_ready.consumer_release(state_Q)
            weights(S, rows, tile + 1, 1 - place)    # beside dV
            warpgroup.wait_group(0)
            dO_ready.consumer_release(state_dO)
            state_dO.advance()
            cute.arch.barrier(barrier_id=SCORES_STORED + place, number_of_threads=BOTH_THREADS)
            part = half(A_idx=place, wg_wait=0)
            if tile + 2 < end:
                cute.arch.barrier_arrive(barrier_id=SCORES_READ + place, number_of_threads=BOTH_THREADS)
            tools.send(part, 0, tile)
        place = (end - 1 - first) % 2
        dO_ready.consumer_wait(state_dO)
        add(A_idx=place, B_idx=0, wg_wait=-1)
        cute.arch.barrier(barrier_id=SCORES_STORED + place, number_of_threads=BOTH_THREADS)
        part = half(A_idx=place, wg_wait=0)
        dO_ready.consumer_release(state_dO)
        tools.send(part, 0, end - 1)
        return dV

    @cute.jit
    def _keys(self, tools: Any, first: Int32, end: Int32, sQ: cute.Tensor, sK: cute.Tensor, sV: cute.Tensor,
              sdO: cute.Tensor, sP: cute.Tensor, sdS: cute.Tensor, sdPsum: cute.Tensor, Q_ready: Any, dO_ready: Any,
              state_Q: Any, state_dO: Any) -> Any:
        """The second warpgroup: dS and the other half of dQ of every tile; returns dK before the scale of scores."""
        dK, add = tools.sum_over_queries(sdS, sQ)
        half = tools.half_of_dQ(1, sdS, sK)
        d_weights, output_sums = tools.product(sdO, sV), tools.of_rows(sdPsum)
        load, store = tools.load(sP), tools.store(sdS)
        for tile in cutlass.range(first, end, unroll=1):
            place = (tile - first) % 2
            dO_ready.consumer_wait(state_dO, dO_ready.consumer_try_wait(state_dO))
            dP = d_weights(A_idx=0, wg_wait=-1)
            sums = copy_utils.load_s2r(output_sums[None, 0])
            cute.arch.barrier(barrier_id=WEIGHTS_STORED + place, number_of_threads=BOTH_THREADS)
            P = layout_utils.reshape_acc_to_mn(load(dP, place))
            warpgroup.wait_group(0)
            dO_ready.consumer_release(state_dO)
            state_dO.advance()
            dS = layout_utils.reshape_acc_to_mn(dP)
            for row in cutlass.range_constexpr(cute.size(dS, mode=[0])):
                for column in cutlass.range_constexpr(cute.size(dS, mode=[1])):
                    dS[row, column] = P[row, column].to(Float32) * (dS[row, column] - sums[row])
            if tile - first >= 2:
                cute.arch.barrier(barrier_id=SCORES_READ + place, number_of_threads=BOTH_THREADS)
            store(utils.cvt_f16(layout_utils.reshape_acc_to_frgA(dP), self.dtype), dst_idx=place)
            _handed_over(1, SCORES_STORED + place)
            Q_ready.consumer_wait(state_Q, Q_ready.consumer_try_wait(state_Q))
            part = half(A_idx=place, wg_wait=-1)
            add(A_idx=place, B_idx=state_Q.index, wg_wait=1)
            tools.send(part, 1, tile)    # beside dK
            warpgroup.wait_group(0)
            Q_ready.consumer_release(state_Q)
            state_Q.advance()
        return dK

    @cute.jit
    def _weights(self, store: Any, scale_log2: Float32, mask: Any, seen_whole: Int32, S: cute.Tensor,
                 rows: cute.Tensor, tile: Int32, place: Int32) -> None:
        """P of a tile's S, stored at `place` for both warpgroups; tiles from `seen_whole` on need no mask."""
        if tile < seen_whole:
            mask(S, m_block=tile)
        P = layout_utils.reshape_acc_to_mn(S)
        for row in cutlass.range_constexpr(cute.size(P, mode=[0])):
            for column in cutlass.range_constexpr(cute.size(P, mode=[1])):
                P[row, column] = cute.math.exp2(P[row, column] * scale_log2 - rows[row], fastmath=True)
        store(utils.cvt_f16(layout_utils.reshape_acc_to_frgA(S), self.dtype), dst_idx=place)
        _handed_over(0, WEIGHTS_STORED + place)

    @cute.jit
    def _deliver(self, tools: Any, seqlen: Any, key_tile: Int32, head: Int32, batch: Int32, heads_divisor: Any,
                 total: cute.Tensor, out: cute.Tensor, shared: cute.Tensor, tma: Any,
                 group: cutlass.Constexpr[int]) -> None:
        """A tile's dV or dK: in 16 bits over the tile's values or keys in shared memory, or added to its group's."""
        size = self.tile_n * self.tile_hdim
        if const_expr(self.qhead_per_kvhead > 1):
            mine = cute.make_tensor(total.iterator, cute.make_layout((VECTOR, size // VECTOR // WARPGROUP_THREADS)))
            to = out[None, head // heads_divisor, batch].iterator + key_tile * size + tools.thread * VECTOR
            for vector in cutlass.range_constexpr(size // VECTOR // WARPGROUP_THREADS):
                _add(mine[None, vector], to + vector * VECTOR * WARPGROUP_THREADS)
        else:
            cute.arch.barrier(barrier_id=int(NamedBarrierBwd.Epilogue), number_of_threads=BOTH_THREADS)
            tile = cute.local_tile(seqlen.offset_batch_K(out, batch, dim=3)[None, None, head],
                                   (self.tile_n, self.tile_hdim), (key_tile, 0))
            send, _, _ = copy_utils.tma_get_copy_fn(tma, 0, cute.make_layout(1), shared, tile, single_stage=True)
            tools.store_sum(shared)(total, dst_idx=None)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=OF_ONE_WARPGROUP + group, number_of_threads=WARPGROUP_THREADS)
            if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4 + 4 * group:
                send()
                cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=True)


def _products(dtype: type[cutlass.Numeric], keys: int, columns: int) -> tuple[Any, Any]:
    """Products of one warpgroup: over features (S, dP), and over queries (dV, dK) with so many columns."""
    K, MN = warpgroup.OperandMajorMode.K, warpgroup.OperandMajorMode.MN
    return tuple(hopper_helpers.make_trivial_tiled_mma(dtype, dtype, major, major, Float32, atom_layout_mnk=(1, 1, 1),
                                                       tiler_mn=(64, size))
                 for major, size in ((K, keys), (MN, columns)))


def _handed_over(group: int, barrier: Int32) -> None:
    """What the threads of a warpgroup have stored may be read by its products, and, past `barrier`, by the other's."""
    cute.arch.fence_view_async_shared()
    cute.arch.barrier(barrier_id=OF_ONE_WARPGROUP + group, number_of_threads=WARPGROUP_THREADS)
    cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=BOTH_THREADS)


def _add(values: cute.Tensor, to: cute.Pointer) -> None:
    atomic_add_fp32x4(*(values[value] for value in range(VECTOR)), to)


@dataclass(frozen=True)
class _Tools:
    """A thread's products, loads and stores, for the tensors that they are given."""

    keys: int
    features: int
    tiling: Tiling
    over_features: Any
    over_queries: Any
    product_dQ: Any
    thread: Int32
    staged: cute.Tensor
    parts: cute.Tensor

    def product(self, left: cute.Tensor, right: cute.Tensor) -> Any:
        """[queries, features] x [keys, features]^T, one warpgroup's alone."""
        shape = (QUERIES, self.keys, self.features)
        factors = sm90_utils.partition_fragment_ABC(self.over_features.get_slice(0), shape, left, right)[1:]
        return partial(sm90_utils.gemm_zero_init, self.over_features, shape[:2], *factors)

    def sum_over_queries(self, left: cute.Tensor, right: cute.Tensor) -> tuple[cute.Tensor, Any]:
        """A sum [keys, features], and what adds [queries, keys]^T x [queries, features] to it."""
        total, *factors = sm90_utils.partition_fragment_ABC(
            self.over_queries.get_slice(0), (self.keys, self.features, QUERIES), layout_utils.transpose_view(left),
            layout_utils.transpose_view(right), swap_AB=self.tiling.transposed)
        total.fill(0.0)
        return total, partial(sm90_utils.gemm_w_idx, self.over_queries, total, *factors, zero_init=False,
                              swap_AB=self.tiling.transposed)

    def half_of_dQ(self, group: int, sdS: cute.Tensor, sK: cute.Tensor) -> Any:
        """dS K, this group's half of the features."""
        shape = (QUERIES, self.features, self.keys)
        factors = sm90_utils.partition_fragment_ABC(self.product_dQ.get_slice(group * WARPGROUP_THREADS), shape, sdS,
                                                    layout_utils.transpose_view(sK))[1:]
        return partial(sm90_utils.gemm_zero_init, self.product_dQ, shape[:2], *factors)

    def of_rows(self, values: cute.Tensor) -> cute.Tensor:
        return layout_utils.mma_partition_C_vec(values, self.over_features.get_slice(self.thread),
                                                expand_shape=self.keys, is_colvec=True)

    def store(self, to: cute.Tensor) -> Any:
        return copy_utils.get_smem_store_C(self.over_features, to, self.thread, position_independent=True,
                                           major_mode_size=self.keys)[0]

    def load(self, stored: cute.Tensor) -> Any:
        """What loads a tile, each thread the places that it has of a product."""
        copies = cute.make_tiled_copy_C(copy_utils.get_smem_load_atom(stored.element_type, False), self.over_features)
        source = copies.get_slice(self.thread).partition_S(stored)

        def loaded(like: cute.Tensor, place: Int32) -> cute.Tensor:
            tile = cute.make_fragment_like(like, stored.element_type)
            cute.copy(copies, source[None, None, None, place], copies.get_slice(self.thread).retile(tile))
            return tile

        return loaded

    def store_sum(self, to: cute.Tensor) -> Any:
        to = layout_utils.transpose_view(to) if self.tiling.transposed else to
        return copy_utils.get_smem_store_C(self.over_queries, to, self.thread, transpose=self.tiling.transposed,
                                           position_independent=True)[0]

    def send(self, half: cute.Tensor, group: int, tile: Int32) -> None:
        """A half of a tile's dQ to global memory, where values are in the order in which the threads have them."""
        vectors = cute.size(half) // VECTOR // self.tiling.parts
        staged = vectors * self.tiling.staged_parts
        place = cute.make_tensor(self.staged[None, group].iterator,
                                 cute.make_layout((VECTOR, WARPGROUP_THREADS, staged)))
        cute.arch.barrier(barrier_id=NamedBarrierBwd.dQEmptyWG0 + group, number_of_threads=STAGING_THREADS)
        cute.autovec_copy(cute.make_tensor(half.iterator, cute.make_layout((VECTOR, staged))),
                          place[None, self.thread, None])
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=NamedBarrierBwd.dQFullWG0 + group, number_of_threads=STAGING_THREADS)
        mine = cute.make_tensor(half.iterator, cute.make_layout((VECTOR, vectors, self.tiling.parts)))
        for part in range(self.tiling.staged_parts, self.tiling.parts):
            to = self.parts[None, part, group, tile].iterator + self.thread * VECTOR
            for vector in range(vectors):
                _add(mine[None, vector, part], to + vector * VECTOR * WARPGROUP_THREADS)
