"""The products beside the SwiGLU activation, and the activation in their epilogue where quack is installed.

`halves` is the result of the first product before the activation, in an order that belongs to the
implementation: torch's is [gate | up], quack's alternates gate and up.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from megatron.pretrain.model.fused import products
from megatron.pretrain.model.fused.kernels import HOPPER, Kernels


SHORT_SUM = 4096
"""Features, at most, of a product that sums over few."""
SMALL_TILE = (128, 256)
TILE_TIMES = {(256, 192): 1.0, (192, 256): 1.0, SMALL_TILE: 1.05}
"""Rows and columns, and the time that an operation takes beside the least, on an H200 at its power limit.

The larger tiles move the least data for an operation, and power that moves data is not there to multiply.
"""


class Gate(Protocol):
    """The five products of a gated MLP that know the order of `halves`, for weights up [2 f, h], down [h, f]."""

    def forward(self, inputs: Tensor, up: Parameter, halves: Tensor, activated: Tensor) -> None:
        """inputs [tokens, h] -> halves [tokens, 2 f], activated [tokens, f]."""

    def backward(self, gradient: Tensor, down: Parameter, halves: Tensor, d_halves: Tensor,
                 activated: Tensor) -> None:
        """gradient [tokens, h] of the output, halves -> the halves' gradient, activated again."""

    def input_gradient(self, d_halves: Tensor, up: Parameter, out: Tensor) -> None:
        """-> out [tokens, h]."""

    def weight_gradient(self, up: Parameter, d_halves: Tensor, inputs: Tensor) -> Tensor:
        """up's gradient, as `products.weight_gradient` returns it."""

    def add_product(self, inputs: Tensor, weight: Parameter, added: Tensor, out: Tensor) -> None:
        """out = added + inputs @ weight^T, for [tokens, features]."""


def gate_for(kernels: Kernels, *, collectives_beside: bool = False) -> Gate:
    """The products of these kernels; `collectives_beside` them others run, on some of the GPU's cores."""
    return QuackGate(dynamic=collectives_beside) if kernels.gate == "quack" else TorchGate()


class TorchGate:
    """Plain products with the activation between them."""

    def forward(self, inputs: Tensor, up: Parameter, halves: Tensor, activated: Tensor) -> None:
        torch.mm(inputs, up.t(), out=halves)
        gate, linear = halves.chunk(2, -1)
        torch.mul(functional.silu(gate), linear, out=activated)

    def backward(self, gradient: Tensor, down: Parameter, halves: Tensor, d_halves: Tensor,
                 activated: Tensor) -> None:
        gate, linear = halves.float().chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_activated = (gradient @ down).float()
        d_gate = d_activated * linear * (sigmoid + silu * (1 - sigmoid))
        d_halves.copy_(torch.cat([d_gate, d_activated * silu], -1))
        activated.copy_(silu * linear)

    def input_gradient(self, d_halves: Tensor, up: Parameter, out: Tensor) -> None:
        torch.mm(d_halves, up, out=out)

    def weight_gradient(self, up: Parameter, d_halves: Tensor, inputs: Tensor) -> Tensor:
        return products.weight_gradient(up, d_halves, inputs)

    def add_product(self, inputs: Tensor, weight: Parameter, added: Tensor, out: Tensor) -> None:
        torch.addmm(added, inputs, weight.t(), out=out)


class QuackGate:
    """quack's products: the activation, its derivative and the residual are part of the product's epilogue.

    The tile shapes are those that were fastest on an H200 at NEO's shapes (benchmarks/kernels.py --sustained), for long
    sums by `large_tile`; on GPUs that are not Hopper's quack chooses. A product's programs share its tiles evenly, or
    with `dynamic` take the next when they are done with one: where a collective holds cores, an even share would wait
    for those programs that start late.
    """

    def __init__(self, *, dynamic: bool = False) -> None:
        self._tile = partial(_tile, dynamic=dynamic)

    def forward(self, inputs: Tensor, up: Parameter, halves: Tensor, activated: Tensor) -> None:
        from quack.gemm_interface import gemm_gated

        gemm_gated(inputs, up.detach().T, activation="swiglu", preact_out=halves, postact_out=activated,
                   concat_layout=("B",), tuned=False, config=self._tile(128, 192, True, (2, 1)))

    def backward(self, gradient: Tensor, down: Parameter, halves: Tensor, d_halves: Tensor,
                 activated: Tensor) -> None:
        from quack.gemm_interface import gemm_dgated

        gemm_dgated(gradient, down.detach(), halves, activation="swiglu", dx_out=d_halves, postact_out=activated,
                    dynamic_scheduler=True, tuned=False, config=self._tile(128, 128, True, (1, 2)))

    def input_gradient(self, d_halves: Tensor, up: Parameter, out: Tensor) -> None:
        _product(d_halves, up.detach(), out, concat_layout=("B",), config=self._large_tile(out, (1, 2)))

    def weight_gradient(self, up: Parameter, d_halves: Tensor, inputs: Tensor) -> Tensor:
        config = self._large_tile(up, (2, 1))
        if not hasattr(up, "main_grad"):
            out = torch.empty_like(up)
            _product(d_halves.T, inputs, out, concat_layout=("out",), config=config)
            return out
        replaced = products.replaces(up)
        _product(d_halves.T, inputs, up.main_grad, concat_layout=("out",) if replaced else ("C", "out"),
                 config=config, add_to_output=not replaced)
        return products.delivered(up)

    def add_product(self, inputs: Tensor, weight: Parameter, added: Tensor, out: Tensor) -> None:
        # Short sums end often: in ping-pong one tile is written while the next is computed.
        short = inputs.size(-1) <= SHORT_SUM and weight.size(0) % 192 == 0
        config = self._tile(128, 192, True, (2, 1)) if short else self._large_tile(out, (1, 2))
        _product(inputs, weight.detach().T, out, C=added, config=config)

    def _large_tile(self, out: Tensor, cluster: tuple[int, int]) -> Any:
        """For a product with a long sum; `cluster` is for small tiles."""
        rows, columns = large_tile(*out.shape, cluster, cores=_cores())
        if rows == 192:    # quack fails with 192 x 256: the transposed product takes 256 x 192
            return self._tile(columns, rows, False, (2, 1), transposed=True)
        return self._tile(rows, columns, False, (1, 2) if rows == 256 else cluster)


def large_tile(rows: int, columns: int, cluster: tuple[int, int], *, cores: int) -> tuple[int, int]:
    """Rows and columns of the tile in which a product of this size takes the least time, in whole waves of tiles.

    Two tiles are a cluster, which cores take as one: side by side, and small ones as `cluster` says.
    """

    def time(tile: tuple[int, int]) -> float:
        down, across = cluster if tile == SMALL_TILE else (1, 2)
        clusters = math.ceil(rows / (tile[0] * down)) * math.ceil(columns / (tile[1] * across))
        return math.ceil(2 * clusters / cores) * math.prod(tile) * TILE_TIMES[tile]

    return min(TILE_TIMES, key=time)


def _product(left: Tensor, right: Tensor, out: Tensor, **options: Any) -> None:
    from quack.gemm_interface import gemm_tuned

    # Below its autotuner, which would try dozens of tiles at the first step of every run.
    gemm_tuned.fn(left, right, out, **options)


@cache
def _cores() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


@cache
def _tile(rows: int, columns: int, pingpong: bool, cluster: tuple[int, int], *, dynamic: bool,
          transposed: bool = False) -> Any:
    """A tile of the product, its schedule and its cluster on Hopper; None, quack's choice, elsewhere."""
    if torch.cuda.get_device_capability() != HOPPER:
        return None
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_m=rows, tile_n=columns, pingpong=pingpong, cluster_m=cluster[0], cluster_n=cluster[1],
                      swap_ab=transposed, device_capacity=9, is_dynamic_persistent=dynamic)
