"""Read Megatron-LM's former checkpoints, `mp_rank_XX/model_optim_rng.pt`, as the NEO fork wrote them too.

Each tensor-parallel (XX) and pipeline-parallel (`mp_rank_XX_YYY`) rank wrote a file with its part of the
model, as a module's state dict, and the arguments of the run. Layers are numbered anew in each stage, and
matrices are cut over the tensor-parallel ranks: here both are put together again, a tensor at a time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import SavedTensor
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.names import rule_of
from megatron.pretrain.export.saved_file import SavedFile
from megatron.pretrain.export.stored import StoredTensor, stored_tensor
from megatron.pretrain.export.weights import Held, copies

if TYPE_CHECKING:
    from torch import Tensor

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")

# From the names of Megatron-LM's own GPT model, before it was megatron-core's, to today's.
_RENAMED = (
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
)
# No weights of their own: tables that follow from the settings, fp8 bookkeeping, a tied output layer's copy.
_NOT_WEIGHTS = re.compile(r"(.*\.inv_freq|.*\._extra_state|word_embeddings_for_head\.weight)")

# Before version 2 the rows of query, key and value lay in another order.
_OLDEST_VERSION = 2.0


@dataclass(frozen=True)
class _Shard:
    """What one tensor-parallel rank holds of a tensor."""

    file: SavedFile
    saved: SavedTensor


class LegacyCheckpoint:
    """The weights in one iteration's folder, under the names that megatron-core gives them today."""

    def __init__(self, folder: Path) -> None:
        """Read the pickles alone. Raises UserError if a rank's file is missing, damaged or of another run."""
        self.folder = folder
        files = _open_files(folder)
        first = files[0, 0].content
        self.args: argparse.Namespace = first["args"]
        self.iteration = _same_iteration(folder, files)
        if first.get("checkpoint_version", 0) < _OLDEST_VERSION:
            raise UserError(f"{folder} has checkpoint_version {first.get('checkpoint_version', 0)}: query, "
                            "key and value lay in another order then; load and save it with Megatron-LM")
        self._shards = dict(_numbered(files))
        if not getattr(self.args, "untie_embeddings_and_output_weights", False):
            self._shards.pop("output_layer.weight", None)    # the last stage's copy of the embedding

    def names(self) -> list[str]:
        """Names of all weights, as `decoder.layers.0.mlp.linear_fc1.weight`."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, whole."""
        held, first = self._held(name), self._shards[name][0].saved.size
        rows = max(one.row + one.rows for one in held)
        if len(first) == 1:
            return (rows,)
        columns = max(one.column + self._shards[name][one.rank].saved.size[1] for one in held)
        return (rows, columns, *first[2:])

    def dtype(self, name: str) -> ElementType:
        """A tensor's type."""
        return self._shards[name][0].saved.storage.dtype

    def check_files(self) -> None:
        """Raise UserError unless what every rank holds of a tensor is of one type and can be put together.

        That every file is whole is known since it was opened: its table of contents is its end.
        """
        for name, shards in self._shards.items():
            if len({(len(shard.saved.size), shard.saved.storage.dtype) for shard in shards}) > 1:
                raise UserError(f"{self.folder}: the ranks' parts of {name} differ in type: they are not of "
                                "one run")

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor's rows lie. Raises UserError where the ranks' parts do not fit together."""
        shards = self._shards[name]
        blocks = [shards[held.rank].file.block(shards[held.rank].saved, held) for held in self._held(name)]
        try:
            return stored_tensor(self.shape(name), self.dtype(name), blocks)
        except ValueError:
            raise self._misfit(name) from None

    def read(self, name: str) -> Tensor:
        """The whole tensor in memory."""
        return self.tensor(name).load()

    def check(self) -> None:
        """Hold every rank's part against the CRC-32 it was saved with. Raises UserError where one differs."""
        for shards in self._shards.values():
            for shard in shards:
                shard.file.check(shard.saved)

    def _held(self, name: str) -> list[Held]:
        rule, shapes = rule_of(name), [shard.saved.size for shard in self._shards[name]]
        if len({len(shape) for shape in shapes}) > 1:
            raise self._misfit(name)
        return (copies if rule is None or len(shapes) == 1 else rule.cut)(shapes)

    def _misfit(self, name: str) -> UserError:
        return UserError(f"{self.folder}: the ranks' parts of {name}, "
                         f"{[list(shard.saved.size) for shard in self._shards[name]]}, do not fit together: "
                         "they are not of one run")


def is_legacy(folder: Path) -> bool:
    """Whether `folder` holds ranks' folders."""
    return folder.is_dir() and any(RANK_FOLDER.match(entry.name) for entry in folder.iterdir())


def _open_files(folder: Path) -> dict[tuple[int, int], SavedFile]:
    """The file of every (tensor, pipeline) rank; none may be missing."""
    found = {}
    for entry in sorted(folder.iterdir()):
        match = RANK_FOLDER.fullmatch(entry.name)
        if match:
            found[int(match[1]), int(match[2] or 0)] = _open_file(entry)
        elif RANK_FOLDER.match(entry.name):
            raise UserError(f"{entry} is an expert-parallel rank's: only dense models can be converted")
    first = min(found)
    args = found[first].content.get("args")
    tensor, pipeline = (getattr(args, f"{kind}_model_parallel_size", None) for kind in ("tensor", "pipeline"))
    if not isinstance(tensor, int) or not isinstance(pipeline, int):
        raise UserError(f"{found[first].path} has no args that say how the model was cut over ranks: only "
                        "checkpoints that Megatron-LM itself saved can be read")
    wanted = {(t, p) for t in range(tensor) for p in range(pipeline)}
    if found.keys() != wanted:
        odd = min(found.keys() ^ wanted)
        said = "is there" if odd in found else "is missing"
        raise UserError(f"{folder}: mp_rank_{odd[0]:02d}{f'_{odd[1]:03d}' if pipeline > 1 else ''} {said}, "
                        f"but the args say tensor-parallel {tensor} x pipeline-parallel {pipeline}")
    return found


def _open_file(folder: Path) -> SavedFile:
    path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    file = SavedFile(path)
    if not isinstance(file.content, dict) or not {"args", "model", "model0"} & file.content.keys():
        raise UserError(f"{path} is no checkpoint of Megatron-LM: it has neither a model nor args")
    return file


def _same_iteration(folder: Path, files: Mapping[tuple[int, int], SavedFile]) -> int:
    iterations: dict[Any, str] = {}
    for file in files.values():
        iterations.setdefault(file.content.get("iteration"), file.path.parent.name)
    if len(iterations) > 1:
        (one, here), (other, there), *_ = iterations.items()
        raise UserError(f"{folder} mixes two iterations: {here} is of {one}, {there} of {other}")
    (iteration,) = iterations
    return iteration if isinstance(iteration, int) else 0


def _numbered(files: Mapping[tuple[int, int], SavedFile]) -> Iterator[tuple[str, list[_Shard]]]:
    """Every tensor, its layer numbered through the whole model, and each tensor-parallel rank's part of it.

    With interleaved stages each rank has several chunks (model0, model1, ...): the first chunks of all stages
    come first, then the second ones.
    """
    tensor = range(1 + max(rank for rank, _ in files))
    pipeline = range(1 + max(stage for _, stage in files))
    chunks = sorted((key for key in files[0, 0].content if re.fullmatch(r"model\d*", key)),
                    key=lambda key: int(key.removeprefix("model") or 0))
    layers_before = 0
    for chunk in chunks:
        for stage in pipeline:
            ranks = [dict(_weights(files[rank, stage].content.get(chunk, {}))) for rank in tensor]
            layers = set()
            for name in ranks[0]:
                match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
                if match:
                    layers.add(int(match[1]))
                whole = f"decoder.layers.{layers_before + int(match[1])}.{match[2]}" if match else name
                yield whole, [_shard(files[rank, stage], part, name) for rank, part in zip(tensor, ranks)]
            layers_before += len(layers)


def _shard(file: SavedFile, part: Mapping[str, SavedTensor], name: str) -> _Shard:
    if name not in part:
        raise UserError(f"{file.path} has no {name}, but rank 0 does: they are not of one run")
    return _Shard(file, part[name])


def _weights(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, SavedTensor]]:
    """The tensors of a nested state dict, by today's names."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _weights(value, f"{prefix}{key}.")
        elif isinstance(value, SavedTensor):
            name = f"{prefix}{key}"
            for old, new in _RENAMED:
                name = re.sub(old, new, name)
            if not _NOT_WEIGHTS.fullmatch(name):
                yield name, value
