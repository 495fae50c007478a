"""converter_cfg.yml: which checkpoints a batch conversion is to leave, and where."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from megatron.pretrain.data.yaml_lines import Scalar, read_mapping
from megatron.pretrain.errors import UserError

TEMPLATE = """\
# Which checkpoints become Hugging Face folders. `bash neo/scripts/batch_convert_ckpt.sh` reads this file.
# Relative paths are relative to the directory the script is started from.

# A folder with one iter_* folder for each saved iteration: a launcher's checkpoint folder.
MEGATRON_CHECKPOINT_PATH: checkpoints/NEO_7b_nl28_tp2_pp1_mb1_gb1024/Pretrain/checkpoint

# One folder for each converted checkpoint comes here.
HF_CHECKPOINT_PATH: checkpoints/NEO_7b_nl28_tp2_pp1_mb1_gb1024/Pretrain/hf

# After how many billions of tokens? For each, the saved iteration closest to it is converted.
CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS: [10, 50, 100]

# The rest is optional: a checkpoint's run.json knows it.

# The tokenizer.model that the model was trained with, or the folder it lies in.
TOKENIZER_DIR: neo/tokenizer.model

# Rows of the vocabulary to keep: all that were trained (64005 for the NEO fork's tokenizer).
# VOCAB_SIZE: 64000

# Tokens a sample and samples an iteration, for checkpoints that do not say how many tokens they have seen.
# SEQ_LEN: 8192
# GB: 1024

# true writes bfloat16, false float32; without it the checkpoint's own type is kept.
BF16: true
"""


@dataclass(frozen=True)
class BatchConfig:
    """The content of converter_cfg.yml."""

    path: Path
    checkpoints: Path
    targets: Path
    keep_at_tokens: tuple[int, ...]
    seq_len: int | None
    global_batch_size: int | None
    vocab_size: int | None
    tokenizer: Path | None
    bf16: bool | None


def read_config(path: Path) -> BatchConfig:
    """Read converter_cfg.yml. Raises UserError naming the line and what should stand there."""
    values = _values(path)
    for key in ("MEGATRON_CHECKPOINT_PATH", "HF_CHECKPOINT_PATH", "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS"):
        if values.get(key) is None:
            raise UserError(f"{path}: {key} is missing; --generate-config writes a file with every key")
    return BatchConfig(
        path=path,
        checkpoints=values["MEGATRON_CHECKPOINT_PATH"],
        targets=values["HF_CHECKPOINT_PATH"],
        keep_at_tokens=values["CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS"],
        seq_len=values.get("SEQ_LEN"),
        global_batch_size=values.get("GB"),
        vocab_size=values.get("VOCAB_SIZE"),
        tokenizer=values.get("TOKENIZER_DIR"),
        bf16=values.get("BF16"))


def write_template(path: Path) -> None:
    """Write a configuration to start from; an existing file is not touched."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise UserError(f"{path} exists and is left as it is: give --generate-config another name") from None
    except OSError as problem:
        raise UserError(f"--generate-config {path}: {problem.strerror}") from None


def _values(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UserError(f"--config {path}: {problem.strerror}; --generate-config {path} writes one to start "
                        "from") from None
    return {key.text: _value(key, node) for key, node in read_mapping(content, str(path)).items()}


def _value(key: Scalar, node: yaml.Node) -> Any:
    if key.text not in _KEYS:
        nearest = difflib.get_close_matches(key.text.upper(), _KEYS, n=1)
        raise UserError(f"{key.where}: unknown key {key.text}; " + (
            f"the nearest known one is {nearest[0]}" if nearest else f"known are {', '.join(_KEYS)}"))
    kind, convert = _KEYS[key.text]
    try:
        value = SafeConstructor().construct_object(node, deep=True)
        return None if value is None else convert(value)
    except (TypeError, ValueError, yaml.constructor.ConstructorError):
        raise UserError(f"{key.where}: {key.text} must be {kind}") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError
    return Path(value).expanduser()


def _billions(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(isinstance(item, bool) for item in value):
        raise ValueError
    # YAML 1.1 takes 4e-05, as Python and shells print it, for text.
    numbers = [float(item) for item in value]
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError
    return tuple(round(number * 10**9) for number in numbers)


_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "VOCAB_SIZE": ("a whole number above 0", _count),
    "TOKENIZER_DIR": ("the path of a tokenizer.model or of its folder", _path),
    "MEGATRON_CHECKPOINT_PATH": ("the path of a folder with iter_* folders", _path),
    "HF_CHECKPOINT_PATH": ("the path of a folder", _path),
    "SEQ_LEN": ("a whole number above 0", _count),
    "GB": ("a whole number above 0", _count),
    "CKPTS_TO_KEEP_BY_BILLIONS_OF_TOKENS": ("a list of numbers above 0, such as [10, 50.5]", _billions),
    "BF16": ("true or false", _flag),
}
