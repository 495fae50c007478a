"""Run by test_store.py as a process of its own: saves and loads in one process, and says what became of it.

    python drive_store.py FOLDER
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.pretrain.checkpoint.manifest import TRACKER_NAME, Manifest
from megatron.pretrain.checkpoint.store import load_everything, load_weights, save_checkpoint
from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.layout import placed
from megatron.pretrain.model.build import build_model
from megatron.pretrain.optim.optimizer import apply_schedule, build_optimizer, parts, step

SHAPE = ("--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
         "--group-query-attention --num-query-groups 2 --seq-length 8 --micro-batch-size 1 --train-iters 9 "
         "--lr 0.1 --untie-embeddings-and-output-weights").split()
ROWS, MORE_ROWS = 128, 160


def main(folder: str) -> None:
    config, root = settle(parse(SHAPE).config, world_size=1), Path(folder)
    with placed(config):
        facts = {"save": save(config, root / "save"), "failed": fail(config, root / "failed"),
                 "again": save_again(config, root / "again"), "rows": other_rows(config, root / "save"),
                 "finetune": finetune(config, root / "save"), "rng": random_states(config, root / "rng"),
                 "damage": damage(config, root / "damage"), "unmoved": before_an_update(config, root / "unmoved")}
    print("FACTS " + json.dumps(facts))


def built(config: RunConfig, rows: int = ROWS, seed: int = 1) -> tuple[list, Any]:
    """A model with other weights for every seed, and an optimizer that made one step."""
    torch.manual_seed(seed)
    chunks = build_model(config, rows, torch.device("cpu"))
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(torch.randn(parameter.shape))
    optimizer = build_optimizer(config, chunks)
    apply_schedule(optimizer, 0.1, 0.0)
    for parameter in chunks[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape))
    step(optimizer, clip_grad=1.0)
    return chunks, optimizer


def save(config: RunConfig, root: Path) -> dict[str, Any]:
    (root / ".iter_0000001.partial").mkdir(parents=True)
    (root / ".iter_0000001.partial" / "left_by_a_crash").touch()
    folder = save_checkpoint(root, *built(config), manifest_at(1, config))
    return {"folder": str(folder), "in_root": names_in(root), "files": names_in(folder)}


def fail(config: RunConfig, root: Path) -> dict[str, Any]:
    """A save that cannot write its files whole, as on a full disk, after one that could."""
    chunks, optimizer = built(config)
    save_checkpoint(root, chunks, optimizer, manifest_at(1, config))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        save_checkpoint(root, chunks, optimizer, manifest_at(2, config))
        raised = ""
    except UserError as error:
        raised = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    failed = {"raised": raised, "in_root": names_in(root), "tracker": (root / TRACKER_NAME).read_text()}
    save_checkpoint(root, chunks, optimizer, manifest_at(2, config))
    return {**failed, "in_root_at_last": names_in(root)}


def save_again(config: RunConfig, root: Path) -> dict[str, Any]:
    """The same iteration saved twice: the second stays."""
    save_checkpoint(root, *built(config, seed=1), manifest_at(1, config))
    second, optimizer = built(config, seed=2)
    folder = save_checkpoint(root, second, optimizer, manifest_at(1, config))
    third, optimizer = built(config, seed=3)
    load_everything(folder, third, optimizer, updates=1, with_rng=False)
    return {"second": weights(second) == weights(third), "in_root": names_in(root)}


def other_rows(config: RunConfig, root: Path) -> dict[str, Any]:
    """More rows of embedding, as another tensor-parallel size pads them."""
    saved, _ = built(config)
    chunks, optimizer = built(config, rows=MORE_ROWS, seed=2)
    load_everything(root / "iter_0000001", chunks, optimizer, updates=1, with_rng=False)
    embedding = weights(chunks)[0]
    pairs = zip(weights(saved), weights(chunks), strict=True)
    return {"same": all(new[:len(old)] == old for old, new in pairs),
            "rows": len(embedding), "zeros": not any(map(any, embedding[ROWS:]))}


def finetune(config: RunConfig, root: Path) -> dict[str, Any]:
    """The weights alone, into a bf16 model: its master weights follow, its moments do not."""
    config = replace(config, train=replace(config.train, bf16=True))
    saved, _ = built(replace(config, train=replace(config.train, bf16=False)))
    torch.manual_seed(2)
    chunks = build_model(config, ROWS, torch.device("cpu"))
    optimizer = build_optimizer(config, chunks)
    load_weights(root / "iter_0000001", chunks, optimizer)
    masters = [parameter.tolist() for part in parts(optimizer) for group in part.optimizer.param_groups
               for parameter in group["params"]]
    rounded = [torch.tensor(weight).bfloat16().tolist() for weight in weights(saved)]
    moments = [state for part in parts(optimizer) for state in part.optimizer.state.values() if state]
    return {"weights": weights(chunks) == rounded, "moments": len(moments),
            "masters": sorted(masters, key=str) == sorted(rounded, key=str)}


def damage(config: RunConfig, root: Path) -> str:
    """What is said of a file that is damaged behind the manifest's back."""
    chunks, optimizer = built(config)
    folder = save_checkpoint(root, chunks, optimizer, manifest_at(1, config))
    (folder / "__0_0.distcp").write_bytes(b"")
    try:
        load_weights(folder, chunks)
    except UserError as error:
        return str(error)
    return "nothing"


def before_an_update(config: RunConfig, root: Path) -> dict[str, bool]:
    """A run that ends before its first update, by each of the engine's optimizers, goes on with empty moments."""
    found = {}
    for kind in ("plain", "distributed"):
        config = replace(config, layout=replace(config.layout, use_distributed_optimizer=kind == "distributed"))
        chunks = build_model(config, ROWS, torch.device("cpu"))
        folder = save_checkpoint(root / kind, chunks, build_optimizer(config, chunks), manifest_at(0, config))
        moved, optimizer = built(config)
        load_everything(folder, moved, optimizer, updates=0, with_rng=False)
        moments = [state["exp_avg"] for part in parts(optimizer) for state in part.optimizer.state.values()]
        found[kind] = weights(moved) == weights(chunks) and bool(moments) and not any(map(torch.any, moments))
    return found


def random_states(config: RunConfig, root: Path) -> dict[str, Any]:
    chunks, optimizer = built(config)
    folder = save_checkpoint(root, chunks, optimizer, manifest_at(1, config))
    at_save = draws()
    load_everything(folder, chunks, optimizer, updates=1, with_rng=True)
    with_rng = draws()
    load_everything(folder, chunks, optimizer, updates=1, with_rng=False)
    return {"taken_over": with_rng == at_save, "left_alone": draws() != at_save}


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(1).item()]


def weights(chunks: list) -> list[list]:
    return [parameter.tolist() for parameter in chunks[0].parameters()]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_at(iteration: int, config: RunConfig) -> Manifest:
    return Manifest(iteration=iteration, consumed_samples=8, consumed_tokens=64, config=config.as_dict(),
                    tokenizer={}, mixture_hash="", train_state={}, versions={})


if __name__ == "__main__":
    main(*sys.argv[1:])
