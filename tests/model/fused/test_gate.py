"""What of the gated MLP's products needs no GPU."""

from __future__ import annotations

import pytest

from megatron.pretrain.model.fused.gate import large_tile


# NEO-7B's and NEO-2B's products on an H200, which has 132 cores: the fastest of benchmarks/README.md.
@pytest.mark.parametrize("rows, columns, cluster, tile", [
    (8192, 3072, (1, 2), (256, 192)), (49152, 3072, (2, 1), (256, 192)),
    (8192, 2048, (1, 2), (128, 256)), (32768, 2048, (2, 1), (192, 256))])
def test_the_fastest_tile_is_chosen(rows: int, columns: int, cluster: tuple[int, int], tile: tuple[int, int]) -> None:
    assert large_tile(rows, columns, cluster, cores=132) == tile


def test_a_last_tile_without_a_neighbour_takes_two_cores() -> None:
    """Five columns of small tiles: 640 as pairs of rows, five waves; 768 as pairs of columns, six."""
    assert large_tile(16384, 1280, (2, 1), cores=132) == (128, 256)
    assert large_tile(16384, 1280, (1, 2), cores=132) == (256, 192)
