"""A checkpoint of any kind: this project's, Megatron-LM's torch_dist, or its former mp_rank_XX folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron.pretrain.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.legacy import LegacyCheckpoint, is_legacy
from megatron.pretrain.export.megatron_args import manifest_of
from megatron.pretrain.export.names import LLAMA, QWEN3, Architecture, find_architecture
from megatron.pretrain.export.reader import TorchDistCheckpoint
from megatron.pretrain.export.saved_file import SavedFile
from megatron.pretrain.export.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

COMMON_FILE = "common.pt"


class Checkpoint(Protocol):
    """The weights in one iteration's folder, whole and by today's names, whatever layout saved them."""

    folder: Path

    def names(self) -> list[str]:
        """Names of all weights, as `decoder.layers.0.mlp.linear_fc1.weight`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def dtype(self, name: str) -> ElementType:
        """A tensor's type."""

    def check_files(self) -> None:
        """Raise UserError unless every file that the weights need is here in full length."""

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor's rows lie. Raises UserError where the checkpoint is damaged."""

    def read(self, name: str) -> Tensor:
        """The whole tensor in memory."""

    def check(self) -> None:
        """Read everything, and hold it against the checksums it was saved with. Raises UserError."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; reads no weights. Raises UserError if there is none, or not a whole one."""
    return LegacyCheckpoint(folder) if is_legacy(folder) else TorchDistCheckpoint(folder)


def describe(checkpoint: Checkpoint, tokenizer_path: Path | None) -> Manifest:
    """What the checkpoint is: its run.json, or else what Megatron-LM's arguments in it say.

    `tokenizer_path` is where the tokenizer lies, if not where the run had it. Raises UserError where neither
    is there, or they describe a model that cannot be converted.
    """
    folder = checkpoint.folder
    if isinstance(checkpoint, LegacyCheckpoint):
        return manifest_of(checkpoint.args, checkpoint.iteration, folder, tokenizer_path)
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder)
    content = SavedFile(folder / COMMON_FILE).content if (folder / COMMON_FILE).is_file() else {}
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise UserError(f"{folder}: not a whole checkpoint: {MANIFEST_NAME} is missing, by which this "
                        f"project says what a model is, and {COMMON_FILE} has no args, by which Megatron-LM "
                        "does")
    iteration = content.get("iteration")
    return manifest_of(args, iteration if isinstance(iteration, int) else 0, folder, tokenizer_path)


def architecture_of(manifest: Manifest, wanted: str | None) -> Architecture:
    """The table to convert by: the one that is `wanted`, or else the plainest that has the model's layers."""
    qk_norm = manifest.config["model"].get("qk_layernorm", False)
    if wanted is None:
        return QWEN3 if qk_norm else LLAMA
    architecture = find_architecture(wanted, "--architecture")
    if architecture.has_qk_norm != qk_norm:
        raise UserError(f"--architecture {wanted}: the model {'has' if qk_norm else 'has no'} norms of "
                        f"query and key (qk_layernorm), and a {wanted} "
                        f"{'has none' if qk_norm else 'needs them'}")
    return architecture
