"""Which saved iterations a batch conversion takes, and what their folders are called."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron.pretrain.checkpoint.manifest import MANIFEST_NAME
from megatron.pretrain.errors import UserError

_MOST_DECIMALS = 9    # a token is 0.000000001 B


@dataclass(frozen=True)
class SavedIteration:
    """One iter_* folder and the tokens the model had seen by then."""

    folder: Path
    iteration: int
    tokens: int


@dataclass(frozen=True)
class Choice:
    """A wish and the saved iteration that comes closest to it."""

    wanted_tokens: int
    saved: SavedIteration

    @property
    def off_by_tokens(self) -> int:
        """Distance of the two."""
        return abs(self.saved.tokens - self.wanted_tokens)


def find_saved(root: Path, seq_len: int | None, global_batch_size: int | None,
               warn: Callable[[str], None]) -> list[SavedIteration]:
    """Whole checkpoints under `root`, by iteration.

    The tokens are those that a checkpoint's run.json counts: the batch may have changed during the run.
    Without one they are iteration x sequence length x global batch size. `warn` hears of folders that
    are left out, and of a run.json that counts otherwise than the two settings do.
    """
    folders = _iteration_folders(root)
    tokens_an_iteration = seq_len * global_batch_size if seq_len and global_batch_size else None
    saved, differing = [], []
    for iteration, folder in folders:
        if not (folder / ".metadata").is_file() and not any(folder.glob("mp_rank_*")):
            warn(f"{folder} is left out: it is not a whole checkpoint (it has neither .metadata nor "
                 "mp_rank_*)")
            continue
        counted = _consumed_tokens(folder)
        if counted is None and tokens_an_iteration is None:
            raise UserError(f"{folder} holds no {MANIFEST_NAME} that counts its tokens: give SEQ_LEN and GB")
        computed = iteration * tokens_an_iteration if tokens_an_iteration else counted
        saved.append(SavedIteration(folder, iteration, computed if counted is None else counted))
        if counted not in (None, computed):
            differing.append(f"{folder.name} has seen {counted:,} tokens by its {MANIFEST_NAME}, which is "
                             f"taken; iteration x SEQ_LEN x GB is {computed:,}")
    if not saved:
        raise UserError(f"MEGATRON_CHECKPOINT_PATH {root} holds no whole checkpoint")
    if differing:
        warn(differing[0] + (f" (and so for {len(differing) - 1} more)" if len(differing) > 1 else ""))
    return saved


def closest(wanted_tokens: int, saved: Sequence[SavedIteration]) -> Choice:
    """The saved iteration closest to `wanted_tokens`; of two as close, the earlier."""
    return min((Choice(wanted_tokens, one) for one in saved), key=lambda choice: choice.off_by_tokens)


def folder_names(chosen: Sequence[SavedIteration], by_billions: bool,
                 converted_iteration: Callable[[str], int | None]) -> dict[SavedIteration, str]:
    """A folder's name for each: as saved, or with `by_billions` the tokens, as `10.49B`.

    The tokens get two decimals, or as many as keep the names apart, also from folders that are there
    already: `converted_iteration` tells which iteration such a folder holds, None if there is none.
    """
    if not by_billions:
        return {one: one.folder.name for one in chosen}
    for decimals in range(2, _MOST_DECIMALS + 1):
        names = {one: f"{one.tokens / 1e9:.{decimals}f}B" for one in chosen}
        taken = any(converted_iteration(name) not in (None, one.iteration) for one, name in names.items())
        if len(set(names.values())) == len(names) and not taken:
            return names
    raise UserError("--rename-hf-by-billions: two checkpoints have seen the same number of tokens; "
                    "leave the flag out, and they are named by their iterations")


def billions(tokens: int) -> str:
    """`10.49B`; a number under 0.1 B keeps three digits that say something."""
    value = tokens / 1e9
    decimals = 2 if value >= 0.1 or not tokens else 2 - math.floor(math.log10(value))
    return f"{value:.{min(decimals, _MOST_DECIMALS)}f}B"


def _iteration_folders(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        raise UserError(f"MEGATRON_CHECKPOINT_PATH {root} is not a folder: "
                        "give a run's folder of checkpoints, with iter_* folders in it")
    found = [(int(match[1]), entry) for entry in root.iterdir()
             if entry.is_dir() and (match := re.fullmatch(r"iter_(\d+)", entry.name))]
    if not found:
        hint = f"; give the folder around it, {root.parent}" if root.name.startswith("iter_") else ""
        raise UserError(f"MEGATRON_CHECKPOINT_PATH {root} holds no iter_* folder{hint}")
    return sorted(found)


def _consumed_tokens(folder: Path) -> int | None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return int(orjson.loads(path.read_bytes())["consumed_tokens"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: it should be JSON with consumed_tokens; "
                        "remove it, and SEQ_LEN and GB are used instead") from None
