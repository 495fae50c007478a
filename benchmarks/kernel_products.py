"""Matrix products as candidates: a linear layer's three, by cuBLAS and by quack's tiles."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from kernel_parts import CHECKED_ROWS, Part, Setting, first_rows, moved, poisoned
from torch import Tensor


class Tile(NamedTuple):
    """One of quack's: a program's part of a product, two of which are a cluster."""

    rows: int
    columns: int
    pingpong: bool
    cluster: tuple[int, int]
    transposed: bool = False


# Three are measured, or all on demand.
TILES = {
    "128x192 pp 2x1": Tile(128, 192, True, (2, 1)),
    "256x192 1x2": Tile(256, 192, False, (1, 2)),
    "128x256 2x1": Tile(128, 256, False, (2, 1)),
    "192x256 1x2": Tile(256, 192, False, (2, 1), transposed=True),
    "128x256 1x2": Tile(128, 256, False, (1, 2)),
    "256x128 1x2": Tile(256, 128, False, (1, 2)),
}


def product_forward(setting: Setting, name: str, inputs: int, outputs: int, times: float) -> Part:
    x, weight = setting.random(setting.tokens, inputs), setting.random(outputs, inputs, scale=0.02)
    out = poisoned(x, setting.tokens, outputs)
    return _product(setting, f"{name} forward", x, weight.T, out, times)


def product_input_gradient(setting: Setting, name: str, inputs: int, outputs: int, times: float) -> Part:
    gradient, weight = setting.random(setting.tokens, outputs), setting.random(outputs, inputs, scale=0.02)
    out = poisoned(gradient, setting.tokens, inputs)
    return _product(setting, f"{name} input gradient", gradient, weight, out, times)


def _product(setting: Setting, name: str, left: Tensor, right: Tensor, out: Tensor, times: float) -> Part:
    left_out: list[str] = []
    quack = {f"quack {tile}": partial(quack_product, left, right, out, tile=tile) for tile in tiles(setting)}
    return Part(
        name, times, flops(left, right), moved(left, right, out),
        reference=lambda: left[:CHECKED_ROWS].double() @ right.double(), picked=first_rows,
        candidates={"cuBLAS" if setting.on_gpu else "torch": lambda: torch.mm(left, right, out=out),
                    **setting.having("quack", quack, left_out)},
        fresh=lambda: out.fill_(float("nan")), left_out=left_out)


def product_weight_gradient(setting: Setting, name: str, inputs: int, outputs: int, times: float) -> Part:
    from megatron.pretrain.model.fused.products import accumulate

    x, gradient = setting.random(setting.tokens, inputs), setting.random(setting.tokens, outputs)
    total = torch.zeros(outputs, inputs, device=setting.device)
    left_out: list[str] = []
    quack = {f"quack {tile}": partial(quack_product, gradient.T, x, total, tile=tile, add_to_output=True)
             for tile in tiles(setting)}
    plain = torch.empty(outputs, inputs, dtype=x.dtype, device=setting.device)
    return Part(
        f"{name} weight gradient", times, flops(gradient.T, x), moved(x, gradient, total, total),
        reference=lambda: gradient[:, :CHECKED_ROWS].double().T @ x.double(), picked=first_rows,
        candidates={"project: into fp32": lambda: (accumulate(total, gradient.T, x), total)[1],
                    "bf16, nothing added": lambda: torch.mm(gradient.T, x, out=plain),
                    **setting.having("quack", quack, left_out)},
        fresh=total.zero_, left_out=left_out)


def quack_product(left: Tensor, right: Tensor, out: Tensor, *, tile: str, **options: Any) -> Tensor:
    from quack.gemm_interface import gemm_tuned

    gemm_tuned.fn(left, right, out, config=tile_config(tile), **options)
    return out


def tile_config(name: str) -> Any:
    from quack.gemm_config import GemmConfig

    tile = TILES[name]
    return GemmConfig(tile_m=tile.rows, tile_n=tile.columns, pingpong=tile.pingpong, cluster_m=tile.cluster[0],
                      cluster_n=tile.cluster[1], swap_ab=tile.transposed, device_capacity=9,
                      is_dynamic_persistent=False)


def tiles(setting: Setting) -> list[str]:
    """The tiles to measure."""
    return list(TILES)[:None if setting.all_tiles else 3]


def flops(left: Tensor, right: Tensor) -> float:
    """Floating-point operations of left @ right."""
    return 2.0 * left.size(0) * left.size(1) * right.size(1)
