"""`run.json` in every checkpoint: what it is, how it was made, and what may continue from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron.pretrain.config import RunConfig
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
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write run.json, as the last file of a checkpoint that is whole."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint but the manifest."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())
            if path.is_file() and path.name != MANIFEST_NAME}


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
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise UserError(f"{tracker}: says {text!r}, where the number of an iteration was expected")
    folder = root / iteration_name(int(text))
    if not folder.is_dir():
        raise UserError(f"{tracker}: names iteration {text}, but {folder} does not exist")
    return folder


def iteration_name(iteration: int) -> str:
    """`iter_0000100`, as Megatron-LM names it."""
    return f"iter_{iteration:07d}"


def read_manifest(folder: Path) -> Manifest:
    """Read and verify run.json. Raises UserError where the checkpoint is empty, foreign or truncated."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder}: not a whole checkpoint of this project ({MANIFEST_NAME} is missing)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**content)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of this project ({error})") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: format {manifest.format}, where this version reads {FORMAT}")
    for name, size_bytes in manifest.file_bytes.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: truncated: {name} is missing")
        if file.stat().st_size != size_bytes:
            raise UserError(f"{file}: truncated or changed: {file.stat().st_size} bytes, where {MANIFEST_NAME} "
                            f"says {size_bytes}")
    return manifest


def check_same_model(manifest: Manifest, config: RunConfig, folder: Path) -> None:
    """Refuse a checkpoint of another shape."""
    for name in SHAPE_SETTINGS:
        saved, wanted = manifest.config["model"][name], getattr(config.model, name)
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


def check_same_schedule(manifest: Manifest, config: RunConfig, folder: Path) -> None:
    """Refuse to resume on another schedule, unless told to."""
    if config.checkpoint.override_opt_param_scheduler:
        return
    saved = {**manifest.config["optim"], "train_iters": manifest.config["train"]["train_iters"]}
    wanted = {**asdict(config.optim), "train_iters": config.train.train_iters}
    for name in (*SCHEDULE_SETTINGS, "train_iters"):
        if saved[name] != wanted[name]:
            raise UserError(f"{folder}: another schedule: --{name.replace('_', '-')} is {saved[name]} there and "
                            f"{wanted[name]} here; --override-opt_param-scheduler takes the flags'")
