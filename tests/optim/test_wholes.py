"""A distributed optimizer's tensors at their owners and back, by real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.pretrain.optim.wholes import shared_out


@pytest.mark.parametrize("ranks", [1, 3])
def test_owners_join_all_pieces_and_hand_them_out(ranks: int, run_tool, tmp_path: Path) -> None:
    said = run_tool("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks,
                    Path(__file__).parent / "drive_wholes.py", tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    facts = json.loads(said.stdout.partition("FACTS ")[2])
    assert all(rank["joined"] and rank["handed_out"] and rank["saved_by_one"] for rank in facts)
    first = facts[0]
    assert sum(rank["owned"] for rank in facts) == first["all"]
    assert max(rank["owned"] for rank in facts) <= first["all"] / ranks + first["largest"]
    if ranks > 1:
        assert first["at_its_owner"] and first["cut"] and first["owned_without_a_piece"], "each case has been looked at"


def test_all_own_about_as_much() -> None:
    assert shared_out([5, 1, 4, 3, 3], 2) == [0, 1, 1, 1, 0], "8 and 8"
    assert shared_out([7], 3) == [0]
    assert shared_out([], 2) == []
