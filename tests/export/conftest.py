"""Checkpoints to convert: real ones, saved by the engine, and quick ones, written by torch alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SINGLE = ("mha", "gqa", "mqa", "head_dim", "tied", "bf16", "legacy", "deep")
LAYOUTS = ("tp2_pp2", "tp4", "interleaved")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}    # small matrices gain nothing from more


@pytest.fixture(scope="session")
def trained_models(tmp_path_factory, tiny_tokenizer, run_tool, repository) -> Path:
    """NAME/iter_0000100 and NAME/expected.pt for every model of save_models.py that fits one process."""
    output = tmp_path_factory.mktemp("trained")
    script = repository / "tests/export/save_models.py"
    outcome = run_tool(script, output, tiny_tokenizer, *SINGLE, env=ONE_THREAD)
    assert outcome.returncode == 0, outcome.stderr
    return output


@pytest.fixture(scope="session")
def trained_layouts(trained_models, tiny_tokenizer, run_tool, repository) -> Path:
    """NAME/iter_0000100 and NAME/former for models as four ranks save them."""
    for layout in LAYOUTS:    # torchrun each: a second meeting of the same ranks would find the first one's keys
        outcome = run_tool(
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4,
            repository / "tests/export/save_models.py", trained_models, tiny_tokenizer, layout, env=ONE_THREAD)
        assert outcome.returncode == 0, outcome.stderr
    return trained_models


@pytest.fixture(scope="session")
def trained_tp2_pp2(trained_layouts) -> Path:
    """The model `head_dim` as four ranks save it: tensor-parallel 2, pipeline-parallel 2."""
    return trained_layouts / "tp2_pp2/iter_0000100"


@pytest.fixture(scope="session")
def of_megatron_lm(tmp_path_factory, tiny_tokenizer, run_tool, repository) -> Path:
    """NAME/iter_0000100 and NAME/expected.pt: torch_dist with Megatron-LM's args and no run.json."""
    output = tmp_path_factory.mktemp("megatron_lm")
    script = repository / "tests/export/save_megatron_lm.py"
    outcome = run_tool(script, output, tiny_tokenizer, "plain", "qk_norm", env=ONE_THREAD)
    assert outcome.returncode == 0, outcome.stderr
    return output


@pytest.fixture(scope="session")
def written(tmp_path_factory, tiny_tokenizer, run_tool, repository) -> Path:
    """A checkpoint that torch alone wrote, with stacked layers. Not to be changed."""
    output = tmp_path_factory.mktemp("written")
    outcome = run_tool(repository / "tests/export/write_checkpoint.py", output, tiny_tokenizer, 100)
    assert outcome.returncode == 0, outcome.stderr
    return output / "iter_0000100"


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    """A copy of `written` to be damaged; its run.json no longer lists files, so that the reader itself must
    find what is wrong."""
    import json

    folder = tmp_path / "iter_0000100"
    shutil.copytree(written, folder)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "file_bytes": {}, "file_ends": {}}))
    return folder
