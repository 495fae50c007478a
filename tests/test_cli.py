"""The command line and its YAML file: what wins, what is refused, and with which sentence."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from megatron.pretrain import megatron_flags
from megatron.pretrain.cli import REQUIRED, parse
from megatron.pretrain.config import SECTIONS, RunConfig, from_dict
from megatron.pretrain.errors import UserError

REQUIRED_FLAGS = {
    "--num-layers": "4", "--hidden-size": "64", "--ffn-hidden-size": "160", "--num-attention-heads": "4",
    "--seq-length": "32", "--micro-batch-size": "2", "--train-iters": "10", "--lr": "1e-3"}


def config_of(*flags: str, without: str = "") -> RunConfig:
    """The run that the required flags (but `without`) and `flags` describe."""
    required = [word for pair in REQUIRED_FLAGS.items() if pair[0] != without for word in pair]
    return parse([*required, *flags]).config


def mistake_of(*flags: str, without: str = "") -> str:
    with pytest.raises(UserError) as caught:
        config_of(*flags, without=without)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path):
    """`yaml_file("lr: 1")` writes run.yaml and returns its path."""

    def write(content: str) -> str:
        (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return write


# --- flags -------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_dataclasses():
    config = config_of()
    assert config.optim == dataclasses.replace(SECTIONS["optim"](), lr=1e-3)
    assert config.layout == SECTIONS["layout"]()


@pytest.mark.parametrize("flags, section, name, value", [
    (["--override-opt_param-scheduler"], "checkpoint", "override_opt_param_scheduler", True),
    (["--override_opt-param-scheduler"], "checkpoint", "override_opt_param_scheduler", True),
    (["--wsd_decay_ratio", "0.2"], "optim", "wsd_decay_ratio", 0.2),
    (["--wsd-decay-ratio=0.2"], "optim", "wsd_decay_ratio", 0.2),
    (["--wsd_half_life", "-1"], "optim", "wsd_half_life", -1),
    (["--train-data-path", "0.5", "a_a", "0.5", "b"], "data", "data_path", ("0.5", "a_a", "0.5", "b")),
    (["--data-path", "one_text_document"], "data", "data_path", ("one_text_document",)),
    (["--bf16", "--no-bf16"], "train", "bf16", False),
    (["--no-load-rng"], "checkpoint", "no_load_rng", True),
    (["--lr", "1", "--lr", "2"], "optim", "lr", 2.0),
])
def test_flag_gives_value(flags, section, name, value):
    assert getattr(getattr(config_of(*flags), section), name) == value


def test_underscores_in_values_stay():
    config = config_of("--save=out_1/check_point", "--load", "a_b")
    assert (config.checkpoint.save, config.checkpoint.load) == ("out_1/check_point", "a_b")


@pytest.mark.parametrize("flags, heads, kv_heads, head_dim", [
    ([], 4, 4, 16),
    (["--group-query-attention"], 4, 1, 16),
    (["--group-query-attention", "--num-query-groups", "2"], 4, 2, 16),
    (["--kv-channels", "24"], 4, 4, 24),
])
def test_shape_is_resolved(flags, heads, kv_heads, head_dim):
    """A checkpoint's run.json must say what was built, not what was left to a default."""
    model = config_of(*flags).model
    assert (model.num_query_groups, model.kv_channels) == (kv_heads, head_dim)
    assert model.num_attention_heads == heads
    assert model.max_position_embeddings == 32


def test_recompute_activations_is_short_for_selective():
    assert config_of("--recompute-activations").train.recompute_granularity == "selective"


def test_fp8_is_short_for_its_format():
    train = config_of("--fp8").train
    assert (train.fp8_format, train.fp8_recipe) == ("hybrid", "delayed")
    assert config_of("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise").train.fp8_recipe == "tensorwise"
    assert config_of().train.fp8_format is None


def test_dry_run_is_no_setting():
    argv = [word for pair in REQUIRED_FLAGS.items() for word in pair]
    assert parse([*argv, "--dry-run"]).dry_run
    assert parse([*argv, "--dry-run"]).config == parse(argv).config


@pytest.mark.parametrize("flags", [
    ["--swiglu"], ["--normalization", "RMSNorm"], ["--position-embedding-type", "rope"],
    ["--use-mcore-models"], ["--rotary-percent", "1.0"], ["--timing-log-level", "0"], ["--use_flash_attn"],
])
def test_statement_of_what_is_so_changes_nothing(flags):
    assert config_of(*flags) == config_of()


# --- refused flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, sentence", [
    (["--num-layer", "4"], "unknown flag --num-layer; the nearest known one is --num-layers"),
    (["--swigl"], "unknown flag --swigl; the nearest known one is --swiglu"),
    (["--learning_rate=1"], "unknown flag --learning-rate"),
    (["--zzzzzzzz"], "unknown flag --zzzzzzzz"),
    (["--fp16"], "--fp16 is a flag of Megatron-LM that is not supported here"),
    (["--rampup-batch-size", "1", "2", "3"],
     "--rampup-batch-size is a flag of Megatron-LM that is not supported here"),
    (["--moe-router-topk=2"], "--moe-router-topk is a flag of Megatron-LM that is not supported here"),
    (["--normalization", "LayerNorm"], "--normalization LayerNorm: not supported; NEO models use RMSNorm"),
    (["--position-embedding-type=learned"], "--position-embedding-type learned: not supported; "
     "NEO models use rotary position embeddings (rope)"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--lr", "nan"], "--lr: 'nan' is not a finite number"),
    (["--num-layers", "4.5"], "--num-layers: '4.5' is not a whole number"),
    (["--lr"], "--lr: needs a value"),
    (["--data-path"], "--data-path/--train-data-path: needs at least one value"),
    (["--bf16=yes"], "--bf16/--no-bf16: takes no value, but was given 'yes'"),
    (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd' (choose from 'adam')"),
    (["--lr-decay-style", "step"], "--lr-decay-style: invalid choice: 'step' (choose from "),
    (["stray"], "'stray' stands where a flag was expected"),
    (["--num-attention-heads", "3"], "--hidden-size 64 is not a multiple of --num-attention-heads 3; give "
     "the head dimension with --kv-channels"),
])
def test_mistake_gets_its_sentence(flags, sentence):
    # Newer Pythons write the choices of argparse without quotes.
    assert mistake_of(*flags).replace("from adam", "from 'adam'").startswith(sentence)


def test_flag_is_never_guessed_from_its_beginning():
    assert "unknown flag --seq-len; the nearest known one is --seq-length" == mistake_of("--seq-len", "8")


@pytest.mark.parametrize("flag", REQUIRED_FLAGS)
def test_missing_required_flag_is_named(flag):
    assert mistake_of(without=flag) == f"{flag}: required, but neither the command line nor --config gives it"


def test_no_flag_is_both_known_and_refused():
    known = {f"--{field.name.replace('_', '-')}" for kind in SECTIONS.values()
             for field in dataclasses.fields(kind)} | megatron_flags.STATEMENTS.keys()
    assert not [flag for flag in known if megatron_flags.is_unsupported(flag)]


# --- the YAML file -----------------------------------------------------------------------------------


def test_flag_wins_over_yaml_and_yaml_over_default(yaml_file):
    path = yaml_file("lr: 2e-4\nmin-lr: 1e-5\nseed: 7\nclip_grad: 0.5\n")
    config = config_of("--config", path, "--seed", "8", without="--lr")
    assert (config.optim.lr, config.optim.min_lr, config.optim.clip_grad) == (2e-4, 1e-5, 0.5)
    assert config.train.seed == 8
    assert config.optim.adam_beta2 == 0.95


def test_required_flags_may_stand_in_yaml(yaml_file):
    lines = [f"{flag[2:]}: {value}" for flag, value in REQUIRED_FLAGS.items()]
    assert parse(["--config", yaml_file("\n".join(lines))]).config == config_of()


@pytest.mark.parametrize("content, flags, name, value", [
    ("bf16: true", [], "bf16", True),
    ("bf16: yes", [], "bf16", True),
    ("bf16: false", [], "bf16", False),
    ("bf16: true", ["--no-bf16"], "bf16", False),
    ("bf16: false", ["--bf16"], "bf16", True),
    ("no_load_rng: true", [], "no_load_rng", True),
    ("no_load_rng: false", [], "no_load_rng", False),
    ("override-opt_param-scheduler: on", [], "override_opt_param_scheduler", True),
])
def test_yaml_booleans_work_both_ways(yaml_file, content, flags, name, value):
    config = config_of("--config", yaml_file(content), *flags)
    section = config.train if hasattr(config.train, name) else config.checkpoint
    assert getattr(section, name) is value


@pytest.mark.parametrize("content, value", [
    ("data_path: one_text_document", ("one_text_document",)),
    ("train_data_path: [0.3, a, 0.7, b]", ("0.3", "a", "0.7", "b")),
    ("data-path:\n  - 0.30\n  - a", ("0.30", "a")),
])
def test_yaml_lists_are_values_of_a_flag(yaml_file, content, value):
    assert config_of("--config", yaml_file(content)).data.data_path == value


def test_statement_may_stand_in_yaml(yaml_file):
    assert config_of("--config", yaml_file("swiglu: true\nnormalization: RMSNorm\n")) == config_of()


@pytest.mark.parametrize("content, where, sentence", [
    ("seed: 1\nnum_layer: 4", "line 2", "unknown flag --num-layer; the nearest known one is --num-layers"),
    ("seed: 1\n\nlr: fast", "line 3", "--lr: 'fast' is not a number"),
    ("lr: 1\nseed: 1\nlr: 2", "line 3", "lr stands twice"),
    ("seed: [1\nlr: 2", "line 2", "not valid YAML"),
    ("seed:\n\tlr: 1", "line 2", "not valid YAML"),
    ("lr:", "line 1", "the value of lr must be one plain value"),
    ("model:\n  num_layers: 4", "line 2", "the value of model must be one plain value"),
    ("data_path:\n  - a\n  - [b]", "line 3", "each item of data_path must be one plain value"),
    ("swiglu: false", "line 1", "swiglu: false: not supported; it is always so here"),
    ("normalization: LayerNorm", "line 1", "--normalization LayerNorm: not supported; NEO"),
    ("fp16: true", "line 1", "--fp16 is a flag of Megatron-LM that is not supported here"),
    ("seed: true", "line 1", "--seed: needs a value"),
    ("bf16: 1", "line 1", "--bf16/--no-bf16: takes no value, but was given '1'"),
    ("config: other.yaml", "line 1", "config: one YAML file cannot name another"),
])
def test_yaml_mistake_names_file_and_line(yaml_file, content, where, sentence):
    path = yaml_file(content)
    assert mistake_of("--config", path).startswith(f"{path}, {where}: {sentence}")


@pytest.mark.parametrize("content", ["- lr", "just words", ""])
def test_yaml_must_be_pairs(yaml_file, content):
    path = yaml_file(content)
    assert mistake_of("--config", path) == f"{path}: must be 'KEY: value' lines"


def test_yaml_must_exist(tmp_path: Path):
    assert mistake_of("--config", str(tmp_path / "no.yaml")) == (
        f"--config {tmp_path}/no.yaml: No such file or directory; it must name a YAML file")


# --- the settings themselves -------------------------------------------------------------------------


ALL_FIELDS = [(section, field) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def test_every_setting_has_help_and_a_name_of_its_own():
    names = [field.name for _, field in ALL_FIELDS]
    assert len(set(names)) == len(names), "two flags of one name"
    assert all(field.metadata["help"].endswith((".", ")")) for _, field in ALL_FIELDS)
    assert set(REQUIRED) == {flag[2:].replace("-", "_") for flag in REQUIRED_FLAGS}


@pytest.mark.parametrize("section, field", ALL_FIELDS, ids=[field.name for _, field in ALL_FIELDS])
def test_every_setting_has_a_flag(section, field):
    choices = field.metadata["choices"]
    sample = {"int": "8", "float": "0.5", "str": "text"}.get(str(field.type).removesuffix(" | None"))
    value = [] if field.type == "bool" else [str(choices[-1])] if choices else [sample or "words"]
    before, after = config_of(), config_of(f"--{field.name.replace('_', '-')}", *value)
    got = getattr(getattr(after, section), field.name)
    expected = True if field.type == "bool" else (value[0],) if field.type.startswith("tuple") else value[0]
    assert got == expected or str(got) == expected
    assert type(got) is not type(None)
    if len(choices) != 1:
        assert got != getattr(getattr(before, section), field.name), "the flag changed nothing"


def test_round_trip_through_json():
    config = config_of("--data-path", "0.5", "a", "0.5", "b", "--bf16", "--save", "out", "--eval-iters", "3")
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_entries_that_are_no_settings_are_left_out():
    saved = config_of().as_dict()
    saved["model"]["padded_vocab_size"] = 64000
    assert from_dict(saved) == config_of()


# --- help --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text(run_tool) -> str:
    said = run_tool("pretrain_gpt.py", "--help", env={"COLUMNS": "100"})
    assert (said.returncode, said.stderr) == (0, "")
    return said.stdout


def test_help_tells_every_setting(help_text):
    words = " ".join(help_text.split())
    for section, field in ALL_FIELDS:
        assert f"\n{section}:" in help_text
        name = field.name.replace("_", "-")
        assert f"--{name}" in help_text or f"--[no-]{name}" in help_text, name
        # argparse breaks lines at the dashes of words.
        assert field.metadata["help"].replace(" ", "") in words.replace(" ", ""), name
    assert words.count("Required.") == len(REQUIRED)
    assert max(map(len, help_text.splitlines())) <= 110


def test_examples_of_the_help_parse(help_text):
    example = help_text.partition("examples:\n")[2].replace("\\\n", " ").splitlines()[0]
    words = shlex.split(example)
    assert parse(words[words.index("pretrain_gpt.py") + 1:]).config.checkpoint.save == "out/checkpoint"
