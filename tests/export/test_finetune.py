"""A model that left and came back trains on as if it had never left, in its layout and in another."""

from __future__ import annotations

import pytest

from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion
from megatron.pretrain.export.to_megatron import ImportOptions, plan_import, run_import

CONTINUED = ("--finetune", "--train-iters", 3, "--seed", 99)
TP2 = ("--tensor-model-parallel-size", 2)


@pytest.fixture(scope="module")
def first(train, tmp_path_factory):
    """A model after some steps, so that none of its tensors is what it was initialised to."""
    return train(tmp_path_factory.mktemp("first"), "--train-iters", 6, "--save-interval", 6)


@pytest.fixture(scope="module")
def original(first, train, tmp_path_factory) -> list[float]:
    """The losses of going on with the weights that never left."""
    return train(tmp_path_factory.mktemp("original"), "--load", first.checkpoints, *CONTINUED).losses()


def there_and_back(source, folder, **options):
    """The checkpoint as it comes back from Hugging Face's format."""
    run_conversion(plan_conversion(source / "iter_0000006", Options(**options)), folder / "hf")
    run_import(plan_import(folder / "hf", ImportOptions()), folder / "back", verify=True)
    return folder / "back"


def test_the_loss_is_that_of_the_original(first, original, train, tmp_path):
    # All 1,024 rows leave, the padding too: then every number is the original's.
    whole = there_and_back(first.checkpoints, tmp_path / "whole", vocab_size=1024)
    assert train(tmp_path / "again", "--load", whole, *CONTINUED).losses() == original
    # Without the padding's rows, which take part in the softmax, others are made up for them.
    trimmed = there_and_back(first.checkpoints, tmp_path / "trimmed")
    losses = train(tmp_path / "padded", "--load", trimmed, *TP2, *CONTINUED, processes=2).losses()
    assert losses == pytest.approx(original, abs=0.03)
    assert losses[0] < first.losses()[0] - 0.2    # it is the trained model, not one that starts anew


def test_another_layout_gives_the_same_loss(first, original, train, tmp_path):
    whole = there_and_back(first.checkpoints, tmp_path, vocab_size=1024)
    layout = ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1)
    losses = train(tmp_path / "again", "--load", whole, *layout, *CONTINUED, processes=2).losses()
    assert losses == pytest.approx(original, abs=1e-5)


def test_without_finetune_it_is_refused(first, train, tmp_path):
    back = there_and_back(first.checkpoints, tmp_path)
    ran = train(tmp_path / "again", "--load", back, "--train-iters", 3, expect_failure=True)
    assert ran.returncode != 0
    assert "start anew from its weights with --finetune" in ran.output
