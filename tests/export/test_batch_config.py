"""converter_cfg.yml: the original's keys, and a sentence for each mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.batch_config import TEMPLATE, read_config, write_template

WHOLE = {
    "VOCAB_SIZE": "64000", "TOKENIZER_DIR": "neo/tokenizer.model",
    "MEGATRON_CHECKPOINT_PATH": "run/checkpoint",
    "HF_CHECKPOINT_PATH": "hf", "SEQ_LEN": "8192", "GB": "1024",
    "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS": "[10, 20.5]", "BF16": "true"}
# A Python or a shell prints a small number as 4e-05.
TARGETS = {"[10, 20.5]": (10_000_000_000, 20_500_000_000), "[4e-05, 1E2]": (40_000, 100_000_000_000)}
NEEDED = ("MEGATRON_CHECKPOINT_PATH", "HF_CHECKPOINT_PATH", "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS")


def config_file(folder: Path, values: dict[str, str]) -> Path:
    path = folder / "cfg.yml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    return path


def test_the_originals_keys_are_read(tmp_path):
    config = read_config(config_file(tmp_path, WHOLE))
    assert (config.checkpoints, config.targets) == (Path("run/checkpoint"), Path("hf"))
    assert (config.seq_len, config.global_batch_size, config.vocab_size) == (8192, 1024, 64000)
    assert (config.tokenizer, config.bf16) == (Path("neo/tokenizer.model"), True)


@pytest.mark.parametrize("written", TARGETS)
def test_targets_are_billions(written: str, tmp_path):
    values = {**WHOLE, "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS": written}
    assert read_config(config_file(tmp_path, values)).keep_at_tokens == TARGETS[written]


def test_what_run_json_knows_may_be_left_out_or_empty(tmp_path):
    for rest in ({}, {"VOCAB_SIZE": "", "TOKENIZER_DIR": "", "SEQ_LEN": "", "GB": "", "BF16": ""}):
        config = read_config(config_file(tmp_path, {**{key: WHOLE[key] for key in NEEDED}, **rest}))
        assert config.seq_len is config.global_batch_size is config.vocab_size is None
        assert config.tokenizer is config.bf16 is None


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(key: str, tmp_path):
    with pytest.raises(UserError, match=f"cfg.yml: {key} is missing"):
        read_config(config_file(tmp_path, {name: value for name, value in WHOLE.items() if name != key}))


@pytest.mark.parametrize(("key", "value", "sentence"), [
    ("VOCAB_SIZ", "64000", "line 9: unknown key VOCAB_SIZ; the nearest known one is VOCAB_SIZE"),
    ("vocab_size", "64000", "line 9: unknown key vocab_size; the nearest known one is VOCAB_SIZE"),
    ("COLOUR", "red", "line 9: unknown key COLOUR; known are VOCAB_SIZE"),
    ("VOCAB_SIZE", "-1", "line 1: VOCAB_SIZE must be a whole number above 0"),
    ("VOCAB_SIZE", "64k", "line 1: VOCAB_SIZE must be a whole number above 0"),
    ("GB", "true", "line 6: GB must be a whole number above 0"),
    ("SEQ_LEN", "0.5", "line 5: SEQ_LEN must be a whole number above 0"),
    ("BF16", "maybe", "line 8: BF16 must be true or false"),
    ("TOKENIZER_DIR", "[a, b]", "line 2: TOKENIZER_DIR must be the path"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "10", "line 7: .* must be a list of numbers above 0"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "[]", "line 7: .* must be a list of numbers above 0"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "[10, -1]", "line 7: .* must be a list of numbers above 0"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "[.inf]", "line 7: .* must be a list of numbers above 0"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "[true]", "line 7: .* must be a list of numbers above 0"),
    ("CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS", "[ten]", "line 7: .* must be a list of numbers above 0"),
    ("BF16", "!!python/name:os.system", "line 8: BF16 must be true or false"),
])
def test_a_mistake_is_pointed_at(key: str, value: str, sentence: str, tmp_path):
    with pytest.raises(UserError, match=f"cfg.yml, {sentence}"):
        read_config(config_file(tmp_path, {**WHOLE, key: value}))


@pytest.mark.parametrize(("text", "sentence"), [
    ("a: [", "not valid YAML"),
    ("- a\n- b\n", "must be 'KEY: value' lines"),
    ("", "must be 'KEY: value' lines"),
    ("GB: 1\nGB: 2\n", "line 2: GB stands twice")])
def test_what_is_no_configuration_is_refused(text: str, sentence: str, tmp_path):
    (tmp_path / "cfg.yml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_config(tmp_path / "cfg.yml")


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="No such file.*--generate-config"):
        read_config(tmp_path / "absent.yml")


def test_the_template_is_read_and_never_overwrites(tmp_path, repository):
    path = tmp_path / "new.yml"
    write_template(path)
    assert read_config(path).keep_at_tokens == (10 * 10**9, 50 * 10**9, 100 * 10**9)
    path.write_text("mine")
    with pytest.raises(UserError, match="exists and is left as it is"):
        write_template(path)
    assert path.read_text() == "mine"
    assert (repository / "neo/scripts/converter_cfg.yml").read_text() == TEMPLATE
