"""`run.json` in every checkpoint: what it is, how it was made, and what may continue from it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron.pretrain.config import RunConfig, from_dict
from megatron.pretrain.errors import UserError

MANIFEST_NAME = "run.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
FORMAT = 1

# The settings that give the model's tensors their shapes and meaning.
SHAPE_SETTINGS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                  "kv_channels", "rotary_base", "norm_epsilon", "untie_embeddings_and_output_weights")
SCHEDULE_SETTINGS = ("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_init",
                     "wsd_decay_ratio", "wsd_half_life", "lr_stable_steps", "weight_decay")


@dataclass(frozen=True)
class Manifest:
    """The content of run.json."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    mixture_hash: str
    train_state: dict[str, Any]
    versions: dict[str, str]
    file_bytes: dict[str, int] = field(default_factory=dict)
    file_ends: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def run_config(self) -> RunConfig:
        """The configuration of the run that saved this; settings it did not know yet have their defaults."""
        return from_dict(self.config)

    def write(self, folder: Path) -> None:
        """Write run.json, as the last file of a checkpoint that is whole."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint but the manifest."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())
            if path.is_file() and path.name != MANIFEST_NAME}


def file_ends(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the last 4 KiB of each file of a checkpoint but the manifest.

    A file of tensors ends with the table of contents of the last one, in which are the checksums of its
    elements: the same file of another iteration ends otherwise, although it has the same size.
    """
    return {name: _hash_of_end(folder / name) for name in file_sizes(folder)}


def _hash_of_end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return hashlib.sha256(file.read()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of what shapes a run's numbers."""
    found = {}
    for name in ("neo-pretrain", "megatron-core", "torch", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def find_checkpoint(load: str) -> Path:
    """The iteration's folder that `--load` means: the latest of a folder of checkpoints, or the one it names."""
    root = Path(load)
    if not root.is_dir():
        raise UserError(f"--load {load}: no such folder")
    if root.name.startswith("iter_"):
        return root
    tracker = root / TRACKER_NAME
    if not tracker.is_file():
        raise UserError(f"--load {load}: holds no checkpoint ({TRACKER_NAME} is missing)")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{tracker}: says {text!r}, where the number of an iteration was expected")
    folder = root / iteration_name(int(text))
    if not folder.is_dir():
        raise UserError(f"{tracker}: names iteration {text}, but {folder} does not exist")
    return folder


def iteration_name(iteration: int) -> str:
    """`iter_0000100`, as Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def check_can_save(save: str) -> None:
    """Refuse a folder that cannot be written to, before hours are spent on what it should hold."""
    root = Path(save).absolute()
    nearest = next(folder for folder in (root, *root.parents) if os.path.lexists(folder))
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"--save {save}: {nearest} is not a folder that can be written to")


def read_manifest(folder: Path) -> Manifest:
    """Read and verify run.json. Raises UserError where the checkpoint is empty, foreign or truncated."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder}: not a whole checkpoint of this project ({MANIFEST_NAME} is missing)")
    try:
        manifest = _manifest_of(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as missing:
        raise UserError(f"{path}: not a manifest of this project ({missing} is missing)") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of this project ({error})") from None
    for name, size_bytes in manifest.file_bytes.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: truncated: {name} is missing")
        if file.stat().st_size != size_bytes:
            raise UserError(f"{file}: truncated or changed: {file.stat().st_size} bytes, where {MANIFEST_NAME} "
                            f"says {size_bytes}")
    for name, end in manifest.file_ends.items():
        if _hash_of_end(folder / name) != end:
            raise UserError(f"{folder / name}: not the file that was saved with {MANIFEST_NAME}, although of "
                            "its size: two iterations are mixed here, or it is damaged")
    return manifest


def _manifest_of(content: dict[str, Any]) -> Manifest:
    """Raises ValueError, TypeError, KeyError or AttributeError for what this project did not write."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, where this version reads {FORMAT}")
    manifest = Manifest(**content)
    if not manifest.run_config.model.num_layers:
        raise ValueError("its config describes no model")
    return manifest


def check_same_model(manifest: Manifest, config: RunConfig, folder: Path) -> None:
    """Refuse a checkpoint of another shape."""
    for name in SHAPE_SETTINGS:
        saved, wanted = getattr(manifest.run_config.model, name), getattr(config.model, name)
        if saved != wanted:
            raise UserError(f"{folder}: a model of another shape: --{name.replace('_', '-')} is {saved} there "
                            f"and {wanted} here")


def check_same_tokenizer(manifest: Manifest, tokenizer: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint whose embedding rows stand for other tokens."""
    saved = manifest.tokenizer
    for name in ("fingerprint", "eod_id"):
        if saved[name] != tokenizer[name]:
            raise UserError(f"{folder}: made with another tokenizer ({name} {saved[name]} there, "
                            f"{tokenizer[name]} here); give the one it was trained with")


def check_same_data(manifest: Manifest, mixture_hash: str, folder: Path, *, override: bool) -> None:
    """Refuse to resume on other data, since consumed samples would point at the wrong ones."""
    if manifest.mixture_hash != mixture_hash and not override:
        raise UserError(f"{folder}: was trained on another mixture or sample order (hash "
                        f"{manifest.mixture_hash[:12]} there, {mixture_hash[:12]} here); go on with "
                        "--override-data, or start anew from its weights with --finetune")


def check_same_precision(manifest: Manifest, config: RunConfig, folder: Path) -> None:
    """Refuse to resume the optimizer in another precision: fp32 master weights are there in bf16 runs alone."""
    saved, wanted = ("bf16" if bf16 else "fp32" for bf16 in (manifest.config["train"]["bf16"], config.train.bf16))
    if saved != wanted and not config.checkpoint.no_load_optim:
        raise UserError(f"{folder}: was trained in {saved}, and this run is {wanted} (--bf16); resume as it was, or "
                        "take the weights alone with --finetune, or without the optimizer with --no-load-optim")


def check_same_schedule(manifest: Manifest, config: RunConfig, folder: Path) -> None:
    """Refuse to resume on another schedule, unless told to."""
    if config.checkpoint.override_opt_param_scheduler:
        return
    there, here = (_schedule_settings(run) for run in (manifest.run_config, config))
    for name, saved in there.items():
        if saved != here[name]:
            raise UserError(f"{folder}: another schedule: --{name.replace('_', '-')} is {saved} there and "
                            f"{here[name]} here; --override-opt_param-scheduler takes the flags'")


def _schedule_settings(config: RunConfig) -> dict[str, Any]:
    """What decides the learning rate and weight decay at a number of consumed samples."""
    return {**{name: getattr(config.optim, name) for name in SCHEDULE_SETTINGS},
            "train_iters": config.train.train_iters, "global_batch_size": config.train.global_batch_size}
