"""What of the gated MLP's products needs no GPU."""

from __future__ import annotations

import pytest

from megatron.pretrain.model.fused.gate import large_tile


# By name what was measured on an H200, which has 132 cores: NEO-7B's and NEO-2B's products.
@pytest.mark.parametrize("rows, columns, tile", [
    (8192, 3072, (256, 192)), (49152, 3072, (256, 192)), (24576, 3072, (256, 192)), (8192, 2048, (128, 256)),
    (32768, 2048, (192, 256)), (1, 1, (128, 256))])
def test_the_fastest_tile_is_chosen(rows: int, columns: int, tile: tuple[int, int]) -> None:
    assert large_tile(rows, columns, cores=132) == tile
