"""What `--load` finds, and what of it a run may start from: a sentence for everything that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.pretrain.checkpoint.manifest import (
    SCHEDULE_SETTINGS, SHAPE_SETTINGS, TRACKER_NAME, Manifest, check_can_save, check_same_data,
    check_same_model, check_same_precision, check_same_schedule, check_same_tokenizer, file_sizes, find_checkpoint,
    package_versions, read_manifest)
from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError

TOKENIZER = {"type": "NullTokenizer", "fingerprint": "f" * 64, "vocab_size": 100, "eod_id": 99,
             "bos_id": None, "eos_id": 99}


def config_of(*flags: str) -> RunConfig:
    argv = ("--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --seq-length 32 "
            "--micro-batch-size 2 --train-iters 100 --lr 1e-3").split()
    return settle(parse([*argv, *flags]).config, world_size=1)


def manifest_of(config: RunConfig) -> Manifest:
    return Manifest(
        iteration=100, consumed_samples=800, consumed_tokens=25600, config=config.as_dict(),
        tokenizer=TOKENIZER, mixture_hash="a" * 64, train_state={"iteration": 100},
        versions=package_versions())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of checkpoints whose one checkpoint, iteration 100, has two files beside its manifest."""
    folder = tmp_path / "checkpoint" / "iter_0000100"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(1000))
    (folder / ".metadata").write_bytes(bytes(10))
    replace(manifest_of(config_of()), file_bytes=file_sizes(folder)).write(folder)
    (folder.parent / TRACKER_NAME).write_text("100\n")
    return folder


def mistake(function, *arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **settings)
    return str(caught.value)


# --- finding -----------------------------------------------------------------------------------------


def test_latest_of_a_folder_or_the_one_that_is_named(saved: Path):
    assert find_checkpoint(str(saved.parent)) == saved
    assert find_checkpoint(f"{saved}/") == saved


@pytest.mark.parametrize("tracker, sentence", [
    ("200\n", "{tracker}: names iteration 200, but {root}/iter_0000200 does not exist"),
    ("release\n", "{tracker}: says 'release', where the number of an iteration was expected"),
    ("", "{tracker}: says '', where the number of an iteration was expected"),
    ("-1", "{tracker}: says '-1', where the number of an iteration was expected"),
    ("²", "{tracker}: says '²', where the number of an iteration was expected"),
])
def test_tracker_that_points_nowhere(saved: Path, tracker: str, sentence: str):
    path = saved.parent / TRACKER_NAME
    path.write_text(tracker, encoding="utf-8")
    assert mistake(find_checkpoint, str(saved.parent)) == sentence.format(tracker=path, root=saved.parent)


def test_tracker_of_bytes_that_are_no_text(saved: Path):
    (saved.parent / TRACKER_NAME).write_bytes(b"\xff\xfe\x00")
    assert "where the number of an iteration was expected" in mistake(find_checkpoint, str(saved.parent))


def test_folder_that_is_missing_or_holds_nothing(tmp_path: Path):
    assert mistake(find_checkpoint, f"{tmp_path}/no") == f"--load {tmp_path}/no: no such folder"
    assert mistake(find_checkpoint, str(tmp_path)) == (
        f"--load {tmp_path}: holds no checkpoint ({TRACKER_NAME} is missing)")


# --- reading -----------------------------------------------------------------------------------------


def test_manifest_reads_back_as_it_was_written(saved: Path):
    manifest = read_manifest(saved)
    assert manifest == replace(manifest_of(config_of()), config=json.loads(json.dumps(config_of().as_dict())),
                               file_bytes={"__0_0.distcp": 1000, ".metadata": 10})
    assert manifest.run_config == config_of()


def test_missing_manifest(saved: Path):
    (saved / "run.json").unlink()
    assert mistake(read_manifest, saved) == (
        f"{saved}: not a whole checkpoint of this project (run.json is missing)")


def test_file_cut_short_or_missing(saved: Path):
    (saved / "__0_0.distcp").write_bytes(bytes(999))
    assert mistake(read_manifest, saved) == (
        f"{saved}/__0_0.distcp: truncated or changed: 999 bytes, where run.json says 1000")
    (saved / "__0_0.distcp").unlink()
    assert mistake(read_manifest, saved) == f"{saved}: truncated: __0_0.distcp is missing"


@pytest.mark.parametrize("changes, reason", [
    ({"format": 2}, "format 2, where this version reads 1"),
    ({"config": {}}, "'model' is missing"),
    ({"config": []}, "list indices must be integers"),
    ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
])
def test_manifest_of_another_kind(saved: Path, changes: dict, reason: str):
    path = saved / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    said = mistake(read_manifest, saved)
    assert said.startswith(f"{path}: not a manifest of this project (")
    assert reason in said


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_manifest_that_is_garbage(saved: Path, content: bytes):
    (saved / "run.json").write_bytes(content)
    assert mistake(read_manifest, saved).startswith(f"{saved}/run.json: not a manifest of this project (")


# --- comparing ---------------------------------------------------------------------------------------


FOLDER = Path("somewhere/iter_0000100")


@pytest.mark.parametrize("flags, sentence", [
    (["--num-layers", "8"], "--num-layers is 4 there and 8 here"),
    (["--ffn-hidden-size", "80"], "--ffn-hidden-size is 160 there and 80 here"),
    (["--group-query-attention"], "--num-query-groups is 4 there and 1 here"),
    (["--kv-channels", "32"], "--kv-channels is 16 there and 32 here"),
    (["--rotary-base", "500000"], "--rotary-base is 10000.0 there and 500000.0 here"),
    (["--untie-embeddings-and-output-weights"],
     "--untie-embeddings-and-output-weights is False there and True here"),
])
def test_another_shape_is_refused(flags: list[str], sentence: str):
    said = mistake(check_same_model, manifest_of(config_of()), config_of(*flags), FOLDER)
    assert said == f"{FOLDER}: a model of another shape: {sentence}"


def test_same_shape_fits_whatever_else_differs():
    config = config_of("--bf16", "--max-position-embeddings", "64", "--lr", "1")
    check_same_model(manifest_of(config_of()), config, FOLDER)
    assert set(SHAPE_SETTINGS) <= set(config.as_dict()["model"])


@pytest.mark.parametrize("change", [{"fingerprint": "e" * 64}, {"eod_id": 2}])
def test_another_tokenizer_is_refused(change: dict):
    said = mistake(check_same_tokenizer, manifest_of(config_of()), {**TOKENIZER, **change}, FOLDER)
    assert said.startswith(f"{FOLDER}: made with another tokenizer ({next(iter(change))} ")


def test_other_data_is_refused_unless_overridden():
    manifest = manifest_of(config_of())
    check_same_data(manifest, "a" * 64, FOLDER, override=False)
    check_same_data(manifest, "b" * 64, FOLDER, override=True)
    assert mistake(check_same_data, manifest, "b" * 64, FOLDER, override=False) == (
        f"{FOLDER}: was trained on another mixture or sample order (hash aaaaaaaaaaaa there, bbbbbbbbbbbb "
        "here); go on with --override-data, or start anew from its weights with --finetune")


@pytest.mark.parametrize("flags, sentence", [
    (["--lr", "2e-3"], "--lr is 0.001 there and 0.002 here"),
    (["--lr-decay-style", "wsd"], "--lr-decay-style is cosine there and wsd here"),
    (["--train-iters", "200"], "--train-iters is 100 there and 200 here"),
    (["--weight-decay", "0.5"], "--weight-decay is 0.01 there and 0.5 here"),
    # The schedule runs in samples: twice the batch would be at another place of it after as many iterations.
    (["--global-batch-size", "4"], "--global-batch-size is 2 there and 4 here"),
])
def test_another_schedule_is_refused_unless_overridden(flags: list[str], sentence: str):
    manifest = manifest_of(config_of())
    said = mistake(check_same_schedule, manifest, config_of(*flags), FOLDER)
    assert said == f"{FOLDER}: another schedule: {sentence}; --override-opt_param-scheduler takes the flags'"
    check_same_schedule(manifest, config_of(*flags, "--override-opt_param-scheduler"), FOLDER)


@pytest.mark.parametrize(("saved", "flags"), [("fp32", ["--bf16"]), ("bf16", [])])
def test_optimizer_of_another_precision_is_refused(saved: str, flags: list[str]):
    manifest = manifest_of(config_of(*(["--bf16"] if saved == "bf16" else [])))
    said = mistake(check_same_precision, manifest, config_of(*flags), FOLDER)
    assert said.startswith(f"{FOLDER}: was trained in {saved}, and this run is ") and "--no-load-optim" in said
    check_same_precision(manifest, config_of(*flags, "--no-load-optim"), FOLDER)


def test_what_is_no_part_of_the_schedule_may_change():
    flags = ["--clip-grad", "0.5", "--save", "elsewhere", "--eval-iters", "5", "--micro-batch-size", "1",
             "--global-batch-size", "2"]
    check_same_schedule(manifest_of(config_of()), config_of(*flags), FOLDER)
    assert set(SCHEDULE_SETTINGS) <= set(config_of().as_dict()["optim"])


def test_checkpoint_of_an_earlier_version_has_the_defaults_of_new_settings():
    manifest = manifest_of(config_of())
    del manifest.config["optim"]["lr_warmup_init"], manifest.config["model"]["norm_epsilon"]
    check_same_schedule(manifest, config_of(), FOLDER)
    check_same_model(manifest, config_of(), FOLDER)
    said = mistake(check_same_model, manifest, config_of("--norm-epsilon", "1e-3"), FOLDER)
    assert "--norm-epsilon is 1e-05 there" in said


# --- saving ------------------------------------------------------------------------------------------


def test_folder_to_save_to_need_not_exist_yet(tmp_path: Path):
    check_can_save(str(tmp_path / "a" / "b"))
    check_can_save(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", ["taken", "taken/checkpoint"])
def test_file_in_the_way_of_the_folder(tmp_path: Path, save: str):
    (tmp_path / "taken").touch()
    assert mistake(check_can_save, f"{tmp_path}/{save}") == (
        f"--save {tmp_path}/{save}: {tmp_path}/taken is not a folder that can be written to")
