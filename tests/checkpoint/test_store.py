"""Saving and loading with real files: what a crash leaves behind, and what a load takes over.

That a resumed run is the straight one bit for bit, in any layout, is shown by test_resume.py and
distributed/test_layouts.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from megatron.pretrain.checkpoint.manifest import TRACKER_NAME, find_checkpoint, read_manifest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def facts(root: Path, run_tool) -> dict:
    said = run_tool(Path(__file__).parent / "drive_store.py", root, env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.partition("FACTS ")[2])


def test_checkpoint_is_one_folder_with_a_manifest_of_its_files(root: Path, facts: dict):
    assert facts["save"]["in_root"] == ["iter_0000001", TRACKER_NAME]
    folder = find_checkpoint(str(root / "again"))
    assert str(folder).endswith("/again/iter_0000001")
    manifest = read_manifest(folder)
    assert (manifest.iteration, manifest.consumed_samples) == (1, 8)
    assert sorted([*manifest.file_bytes, "run.json"]) == sorted(path.name for path in folder.iterdir())


def test_what_a_crash_left_is_no_part_of_the_next_checkpoint(facts: dict):
    assert "left_by_a_crash" not in facts["save"]["files"]


def test_tensors_have_the_names_and_shapes_that_other_tools_read(root: Path, facts: dict):
    entries = dcp.FileSystemReader(root / "again" / "iter_0000001").read_metadata().state_dict_metadata
    shapes = {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    weights = {
        "embedding.word_embeddings.weight": (128, 32),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 64, 32),
        "decoder.layers.self_attention.linear_proj.weight": (2, 32, 32),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 32),
        "decoder.layers.mlp.linear_fc1.weight": (2, 96, 32),
        "decoder.layers.mlp.linear_fc2.weight": (2, 32, 48),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (128, 32)}
    moments = {f"optimizer.state.{moment}.{name}": shape for name, shape in weights.items()
               for moment in ("exp_avg", "exp_avg_sq")}
    assert shapes == weights | moments


def test_save_that_fails_leaves_the_one_before_it(root: Path, facts: dict):
    failed = facts["failed"]
    assert failed["raised"].startswith(f"{root}/failed/.iter_0000002.partial: this checkpoint cannot be written: ")
    assert failed["raised"].endswith("What was saved before it is whole, and the next start goes on from there")
    assert " GiB were free there" in failed["raised"]
    assert failed["in_root"] == ["iter_0000001", TRACKER_NAME]
    assert failed["tracker"] == "1\n"
    assert failed["in_root_at_last"] == ["iter_0000001", "iter_0000002", TRACKER_NAME], "then space came back"
    read_manifest(root / "failed" / "iter_0000001")


def test_iteration_saved_twice_is_the_second(facts: dict):
    assert facts["again"] == {"second": True, "in_root": ["iter_0000001", TRACKER_NAME]}


def test_rows_that_a_checkpoint_lacks_are_zero(facts: dict):
    assert facts["rows"] == {"same": True, "rows": 160, "zeros": True}


def test_weights_alone_reach_the_master_weights_and_no_moments(facts: dict):
    assert facts["finetune"] == {"weights": True, "masters": True, "moments": 0}


def test_a_run_is_saved_before_its_first_update(facts: dict):
    assert facts["unmoved"] == {"plain": True, "distributed": True}


def test_random_states_are_taken_over_only_when_asked(facts: dict):
    assert facts["rng"] == {"taken_over": True, "left_alone": True}


def test_damaged_file_is_told_in_a_sentence(root: Path, facts: dict):
    sentence, _, error = facts["damage"].rpartition(": ")
    assert sentence == f"{root}/damage/iter_0000001: cannot be loaded, its files are damaged"
    assert error in ("EOFError()", "EOFError('Ran out of input')"), "as megatron-core 0.16 and 0.19 read it"
