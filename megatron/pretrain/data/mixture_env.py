"""What a launcher takes from a mixture: mixture.env, and the blend beside it, written and read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron.pretrain.data.mixture import Mixture
from megatron.pretrain.errors import UserError

ENV_KEYS = ("DATA_PATH", "TRAIN_ITERS", "GLOBAL_BATCH_SIZE", "SEQ_LEN", "MIXTURE_CONFIG", "MIXTURE_HASH")
_NUMERIC_ENV_KEYS = ("TRAIN_ITERS", "GLOBAL_BATCH_SIZE", "SEQ_LEN")


def blend_file(env_path: str | Path) -> Path:
    """The blend file that stands beside a mixture.env."""
    return Path(env_path).with_suffix(".blend")


def write_mixture_env(mixture: Mixture, env_path: str | Path) -> None:
    """Write what a launcher needs to `env_path`, and the blend alone beside it; each whole or not at all."""
    values = (mixture.mixture_string, mixture.train_iters, mixture.global_batch_size, mixture.seq_len,
              mixture.config_path, mixture.config_hash)
    lines = ["# Made by gen_mixture_str.sh. The launchers read it as data; no shell ever runs it."]
    lines += [f"{key}={value}" for key, value in zip(ENV_KEYS, values, strict=True)]
    path = Path(env_path)
    if blend_file(path) == path or path.is_dir():
        taken = "a folder" if path.is_dir() else "the blend file's name"
        raise UserError(f"{path}: this is {taken}; the environment file must be named mixture.env or so")
    _write_all({blend_file(path): mixture.mixture_string + "\n", path: "\n".join(lines) + "\n"})


def _write_all(texts: Mapping[Path, str]) -> None:
    temporaries = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            temporaries[path].write_text(text, encoding="utf-8")
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; nothing was written") from None
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def read_mixture_env(env_path: str | Path) -> dict[str, str]:
    """The values of a mixture.env, as text: ENV_KEYS, all of them and nothing else.

    Raises UserError for a file that is missing or that gen_mixture_str.sh did not write so, and for one
    whose YAML file has changed since.
    """
    path = Path(env_path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; bash neo/scripts/gen_mixture_str.sh writes this file") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or key not in ENV_KEYS or key in values:
            raise UserError(f"{path}, line {number}: {line!r} is not one of the lines {', '.join(ENV_KEYS)}, "
                            "each once; run neo/scripts/gen_mixture_str.sh again")
        if key in _NUMERIC_ENV_KEYS and not re.fullmatch(r"[1-9]\d*", value):
            raise UserError(f"{path}, line {number}: {key}={value}: must be a whole number above 0")
        values[key] = value
    missing = [key for key in ENV_KEYS if key not in values]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; run neo/scripts/gen_mixture_str.sh again")
    _check_fresh(path, values)
    return values


def _check_fresh(path: Path, values: Mapping[str, str]) -> None:
    config = Path(values["MIXTURE_CONFIG"])
    again = f"run bash neo/scripts/gen_mixture_str.sh -c {config}, or set DATA_PATH"
    try:
        found = hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: stale: {config} cannot be read ({error.strerror}); {again}") from None
    if found != values["MIXTURE_HASH"]:
        raise UserError(f"{path}: stale: {config} has changed since; {again}")
