"""Joining token sets: the shards of one preprocessing to what one run writes, or any sets of one dtype."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.pretrain.data.indexed import IndexedTokens, IndexedWriter, dataset_prefix, read_manifest
from megatron.pretrain.data.progress import ByteProgress
from megatron.pretrain.data.staging import StagedFiles, writing
from megatron.pretrain.errors import UserError

MUST_AGREE = ("tokenizer", "append_eod", "dtype")
"""What manifests of parts must say alike. Of what else is not summed, a list of all values remains."""


@dataclass(frozen=True)
class Merged:
    """What was joined."""

    prefix: str
    parts: int
    documents: int
    tokens: int
    seconds: float


def merge_sets(prefixes: Sequence[str], output_prefix: str) -> Merged:
    """Join the sets, in this order, to `output_prefix`; whole or not at all.

    Raises UserError where they do not go together: another dtype, or manifests that name other tokenizers.
    """
    with _staged() as staging:
        return _merge(staging, [dataset_prefix(prefix) for prefix in prefixes], output_prefix)


def merge_shards(prefix: str) -> list[Merged]:
    """Join all shards of `prefix`, key by key, and their rejected lines; all of it or nothing.

    Raises UserError naming the shard that is missing, or differs.
    """
    count, keys = _find_shards(prefix)
    stems = [f"{prefix}_{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
    with _staged() as staging:
        merged = [_merge(staging, [f"{stem}_{key}_document" for stem in stems], f"{prefix}_{key}_document")
                  for key in keys]
        rejects = [f"{stem}_rejects.jsonl" for stem in stems]
        if any(map(os.path.exists, rejects)):
            _concatenate(staging, rejects, f"{prefix}_rejects.jsonl")
    return merged


@contextlib.contextmanager
def _staged() -> Iterator[StagedFiles]:
    staging = StagedFiles()
    try:
        yield staging
        staging.publish()
    except BaseException:
        if not staging.is_published:
            staging.discard()
        raise


def _find_shards(prefix: str) -> tuple[int, list[str]]:
    """How many shards the prefix has, and their keys."""
    pattern = re.compile(re.escape(prefix) + r"_(\d{5})-of-(\d{5})_(.+)_document\.idx")
    names = sorted(glob.glob(f"{glob.escape(prefix)}_*-of-*_document.idx"))
    found = [match.groups() for match in map(pattern.fullmatch, names) if match]
    if not found:
        raise UserError(f"--output-prefix {prefix}: no shard {prefix}_00001-of-..._document.idx is there; "
                        "tools/preprocess_data.py --shard writes them, and --input names other sets")
    counts = {count for _, count, _ in found}
    if len(counts) > 1:
        raise UserError(f"--output-prefix {prefix}: there are shards of {' and of '.join(sorted(counts))}; "
                        "move those away that are not to be joined")
    return int(counts.pop()), sorted({key for _, _, key in found})


def _merge(staging: StagedFiles, prefixes: Sequence[str], output_prefix: str) -> Merged:
    started = time.monotonic()
    for prefix in prefixes:
        if os.path.realpath(prefix) == os.path.realpath(output_prefix):
            raise UserError(f"--output-prefix {output_prefix}: is also an input; choose another prefix")
    parts = [IndexedTokens(prefix) for prefix in prefixes]
    manifest = _joined_manifest(parts)
    for part in parts:
        if part.dtype != parts[0].dtype:
            raise UserError(f"{part.prefix}: holds {part.dtype} and {parts[0].prefix} {parts[0].dtype}; "
                            "sets of different tokenizers cannot be joined")
    writer = IndexedWriter(output_prefix, parts[0].dtype, staging=staging)
    total_bytes = sum(part.tokens.nbytes for part in parts)
    with ByteProgress(f"joining {os.path.basename(output_prefix)}", total_bytes) as progress:
        for part in parts:
            writer.add_set(part)
            progress.advance(part.tokens.nbytes)
    writer.seal(manifest)
    return Merged(output_prefix, len(parts), writer.n_documents, writer.n_tokens, time.monotonic() - started)


def _joined_manifest(parts: Sequence[IndexedTokens]) -> dict[str, Any] | None:
    """The parts' manifests as one; None where none of them has one, as with Megatron-LM's sets."""
    manifests = [read_manifest(part.prefix) for part in parts]
    if not any(manifests):
        return None
    first = manifests[0]
    for part, manifest in zip(parts, manifests):
        if not first or not manifest:
            raise UserError(f"{(part if first else parts[0]).prefix}.json: is missing, and other parts have "
                            "one; all or none must say how they were made")
        for name in MUST_AGREE:
            if first.get(name) != manifest.get(name):
                raise UserError(f"{part.prefix}.json: its {name} is {manifest.get(name)}, and that of "
                                f"{parts[0].prefix} is {first.get(name)}; the parts must be made alike")
    return _sum_manifests(parts, manifests)


def _sum_manifests(parts: Sequence[IndexedTokens], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = manifests[0]
    are_shards = [manifest.get("shard") for manifest in manifests] == [
        f"{number}/{len(parts)}" for number in range(1, len(parts) + 1)]
    if are_shards and len(parts) > 1:
        for part, manifest in zip(parts, manifests):
            if manifest["sources"] != first["sources"]:
                raise UserError(f"{part.prefix}.json: its sources are not those of {parts[0].prefix}; the "
                                "input changed between the shards, so preprocess them again")
        sources = first["sources"]
    else:
        sources = [source for manifest in manifests for source in manifest.get("sources", [])]
    rejected: Counter[str] = Counter()
    for manifest in manifests:
        rejected.update(manifest.get("rejected", {}))
    return {**{name: _common(name, manifests) for name in first},
            "shard": "1/1", "sources": sources, "rejected": dict(rejected),
            "documents": sum(part.n_documents for part in parts),
            "tokens": sum(part.n_tokens for part in parts),
            "text_bytes": sum(manifest.get("text_bytes", 0) for manifest in manifests),
            "seconds": round(sum(manifest.get("seconds", 0) for manifest in manifests), 3)}


def _common(name: str, manifests: Sequence[dict[str, Any]]) -> Any:
    values = [manifest[name] for manifest in manifests if name in manifest]
    distinct = [value for number, value in enumerate(values) if value not in values[:number]]
    return distinct if len(distinct) > 1 else distinct[0]


def _concatenate(staging: StagedFiles, paths: Sequence[str], final: str) -> None:
    target = staging.create(final)
    for path in paths:
        try:
            source = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; other shards have one") from None
        with source, writing(final):
            shutil.copyfileobj(source, target, 1 << 20)
