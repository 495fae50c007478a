"""The optimizers the engine builds for us, driven by two processes: decay, skipped steps, and loading.

Every fact is asked of both optimizers (plain and distributed), both precisions, and of data-parallel and of
tensor-parallel ranks, since each combination is another path through the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

VARIANTS = ("fp32 plain", "fp32 distributed", "bf16 plain", "bf16 distributed")


@pytest.fixture(scope="module", params=[(1, "torch"), (2, "torch"), (1, "triton"), (1, "by_group")],
                ids=["DP2", "TP2", "DP2 with the GPU's kernel", "DP2 with counts by group"])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_tool) -> dict:
    """What each rank found for each variant."""
    ranks, kernel = request.param
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    said = run_tool(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        Path(__file__).parent / "drive_optimizer.py", ranks, tmp_path_factory.mktemp("optimizer"), kernel,
        env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.partition("FACTS ")[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_decay_shrinks_matrices_and_leaves_norms(facts: dict, variant: str):
    # lr 0.125 x weight decay 0.25; bf16 keeps 8 bits, so a weight shrinks by that to within 2 x 2^-8.
    tolerance = 1e-6 if variant.startswith("fp32") else 2**-7
    for rank in facts[variant]:
        assert rank["decay"]["matrices"] == pytest.approx([1 - 0.125 * 0.25] * 2, rel=tolerance)
        assert rank["decay"]["norms"] == [1.0, 1.0]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_not_finite_on_one_rank_changes_nothing_on_any(facts: dict, variant: str, value: str):
    for rank in facts[variant]:
        assert rank["skipped"][value] == {"updated": False, "is_finite": False, "untouched": True}
        assert rank["moved"], "the step after it must be made"


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_parameter_counts_its_own_steps_after_a_load(facts: dict, variant: str):
    for rank in facts[variant]:
        assert rank["steps"] > 4
        assert rank["storages"] == rank["steps"], "parameters share a step: one update would count as many"
        assert rank["steps_after_load"] == [2.0]
        assert rank["steps_after_update"] == [3.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_state_is_the_saved_one_and_moves_on_alike(facts: dict, variant: str):
    for rank in facts[variant]:
        assert rank["loaded"]
        assert rank["moved_again"] == [True, True]
        assert rank["same_after_update"]
