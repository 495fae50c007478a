"""One measurement of one arm of benchmarks/train_step.py, in a process (or one a GPU) of its own.

The arm comes as JSON in the first argument. Rank 0 writes what it measured to result.json in the folder named there,
anew after every part, so that what was measured before a failure is not lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import versions
from profile_parts import profile
from train_step_config import LeftOut, check_kernels, engine_fp8, layers_of, run_config, shape_of

WARM_UP_STEPS = 3


def main(spec: dict[str, Any]) -> int:
    record = Record(Path(spec["folder"]) / "result.json", spec["started"])
    warnings.filterwarnings("ignore")
    if layers_of(spec) != "transformer_engine":
        # The engine takes Adam from Transformer Engine where it finds it: the other arms are measured as they
        # run where it is not installed.
        sys.modules["transformer_engine"] = None
    try:
        import_all(spec)
        record.mark("import")
        record.leave_out(wait_for_turn(Path(spec["folder"]), spec["parent"]))
        with contextlib.ExitStack() as stack:
            arm = start(spec, record, stack)
            measure(arm, spec, record)
            # Ranks leave the group together; where a part has failed on some of them, they could not.
            if record.values["failed"]:
                record.write()
                os._exit(1)
            release(arm)
    except LeftOut as reason:
        record.put(left_out=str(reason))
    except Exception as error:
        record.fail("start", error)
    return 1 if record.values["failed"] else 0


class Record:
    """What one measurement has found so far; rank 0 keeps it in a file."""

    def __init__(self, path: Path, started: float) -> None:
        self.values: dict[str, Any] = {"failed": {}}
        self._path = path
        self._started = started
        self._writes = os.environ.get("RANK", "0") == "0"

    def put(self, **values: Any) -> None:
        self.values.update(values)
        self.write()

    def mark(self, name: str) -> None:
        """Remember how many seconds after the process was asked for this point was reached."""
        self.values.setdefault("start_s", {})[name] = time.time() - self._started
        self.write()

    def leave_out(self, seconds: float) -> None:
        """Count no waiting among the seconds of `mark`."""
        self._started += seconds

    def fail(self, part: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        self.values["failed"][part] = {"reason": reason, "traceback": traceback.format_exc()}
        print(f"FAILED {part}: {reason}", flush=True)
        traceback.print_exc()
        self.write()

    def write(self) -> None:
        if self._writes:
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(self.values), encoding="utf-8")
            fresh.replace(self._path)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model, its optimizer and one micro-batch of random tokens, ready to train."""

    config: Any
    place: Any
    chunks: list[Any]
    optimizer: Any
    batch: Any

    @property
    def on_gpu(self) -> bool:
        return self.place.device.type == "cuda"

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def accumulate(self) -> Any:
        """Forward and backward of a micro-batch on top of the gradients there are; its totals.

        Weights are cast to fp8 anew, as in a step's first micro-batch: the engine's layers do so too.
        """
        from megatron.pretrain.train.step import accumulate

        return accumulate(self.chunks, [self.batch])

    def whole_step(self) -> Any:
        """What the trainer does with a global batch of one micro-batch a rank; the totals of its loss."""
        from megatron.pretrain.train.step import end_step, forward_backward

        self.optimizer.zero_grad()
        total = forward_backward(self.chunks, [self.batch])
        self.update()
        end_step(self.chunks)
        return total

    def update(self) -> None:
        """Norm, clipping and Adam with the gradients there are. ArithmeticError where nothing changed."""
        from megatron.pretrain.optim.optimizer import step

        outcome = step(self.optimizer, self.config.optim.clip_grad)
        if not outcome.updated:
            raise ArithmeticError(f"the step was skipped: gradient norm {outcome.grad_norm}")


def import_all(spec: dict[str, Any]) -> None:
    """What takes seconds to import and touches no GPU."""
    if layers_of(spec) == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise LeftOut("not installed: transformer-engine")
        importlib.import_module("transformer_engine.pytorch")
    for name in ("model.build", "optim.optimizer", "train.step"):
        importlib.import_module(f"megatron.pretrain.{name}")


def wait_for_turn(folder: Path, parent: int) -> float:
    """Say that this process is ready, and wait for the word to go. Returns the seconds that took.

    ProcessLookupError if the process that asked for the measurement has gone.
    """
    (folder / f"ready-{os.environ.get('RANK', '0')}").touch()
    begin = time.time()
    while not (folder / "go").exists():
        os.kill(parent, 0)    # a signal that is only tried
        time.sleep(0.02)
    return time.time() - begin


def start(spec: dict[str, Any], record: Record, stack: contextlib.ExitStack) -> Arm:
    """Build and run the first step, and note when each was done."""
    import torch

    from megatron.pretrain.errors import UserError
    from megatron.pretrain.layout import placed
    from megatron.pretrain.train.step import mean_loss

    try:
        config = run_config(spec)
        place = stack.enter_context(placed(config))
        check_kernels(spec, place.device.type)
        with engine_fp8(spec):
            arm = build(spec, config, place)
    except UserError as mistake:
        raise LeftOut(str(mistake)) from None
    arm.synchronize()
    record.mark("build")
    record.put(first_loss=mean_loss(arm.whole_step()))
    arm.synchronize()
    record.mark("first_step")
    record.put(versions=versions(), device=torch.cuda.get_device_name() if arm.on_gpu else "CPU",
               optimizer=_kind_of(arm.optimizer),
               parameters_on_rank=sum(one.numel() for chunk in arm.chunks for one in chunk.parameters()))
    return arm


def build(spec: dict[str, Any], config: Any, place: Any) -> Arm:
    import numpy as np

    from megatron.pretrain.data.batches import MicroBatch
    from megatron.pretrain.model.build import build_model
    from megatron.pretrain.model.flops import padded_vocab_size
    from megatron.pretrain.optim.optimizer import apply_schedule, build_optimizer
    from megatron.pretrain.train.step import connect, record

    shape = shape_of(spec)
    chunks = build_model(config, padded_vocab_size(shape.vocab_size, 128, spec["tp"]), place.device)
    optimizer = build_optimizer(config, chunks)
    apply_schedule(optimizer, config.optim.lr, config.optim.weight_decay)
    connect(chunks, optimizer)
    if config.train.enable_cuda_graph:
        record(chunks[0], 1)
    random = np.random.default_rng([spec["round"], place.data_parallel_rank])
    drawn = random.integers(0, shape.vocab_size * 255 // 256, (spec["micro_batch"], shape.seq_length + 1))
    batch = MicroBatch(tokens=np.ascontiguousarray(drawn[:, :-1]), labels=np.ascontiguousarray(drawn[:, 1:]),
                       loss_mask=np.ones((spec["micro_batch"], shape.seq_length), np.float32))
    return Arm(config, place, chunks, optimizer, batch)


def measure(arm: Arm, spec: dict[str, Any], record: Record) -> None:
    """The parts, each for itself: a part that fails says so and leaves the others alone."""
    import torch

    steps = spec["steps"]

    def warm_up() -> dict[str, Any]:
        from megatron.pretrain.train.step import mean_loss

        totals = [arm.whole_step() for _ in range(WARM_UP_STEPS)]
        return {"loss": mean_loss(totals[-1])}

    def forward_and_backward() -> dict[str, Any]:
        with only_accumulating(arm.chunks):
            arm.accumulate()    # where micro-batches are recorded, one that is not a step's first is only now
            return {"fb_ms": timed(arm, arm.accumulate, steps)}

    def profiled() -> dict[str, Any]:
        return {"profile": profile(arm.whole_step, arm.synchronize, on_gpu=arm.on_gpu)}

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "warm-up": warm_up,
        "forward and backward": forward_and_backward,
        "step": lambda: {"step_ms": timed(arm, arm.whole_step, steps)},
        "optimizer": lambda: {"optimizer_ms": timed(arm, arm.update, steps)},
        "memory": lambda: {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if arm.on_gpu else {},
        "activations": lambda: kept_for_backward(arm) if arm.on_gpu else {},
        "rates": lambda: rates(arm, spec, record.values)}
    if spec["profile"]:
        parts["profile"] = profiled
    for name, part in parts.items():
        try:
            record.put(**part())
        except Exception as error:
            record.fail(name, error)
            if spec["tp"] * spec["dp"] > 1:
                # The other ranks wait in a collective that this one has left.
                return


def release(arm: Arm) -> None:
    """What the trainer does after its last step."""
    from megatron.pretrain.train.step import release

    release(arm.chunks)


def kept_for_backward(arm: Arm) -> dict[str, Any]:
    """GiB that a micro-batch's forward pass leaves allocated for its backward pass: in all, and by one layer.

    Weights in fp8 are not among it: those of the step before are still there.
    """
    import torch
    from megatron.core.utils import unwrap_model

    from megatron.pretrain.train.step import meet_peers

    [chunk] = arm.chunks
    allocated: list[int] = []

    def note(*_: Any) -> None:
        allocated.append(torch.cuda.memory_allocated())

    tokens, labels = (torch.from_numpy(each).to(arm.place.device) for each in (arm.batch.tokens, arm.batch.labels))
    hooks = [layer.register_forward_hook(note) for layer in unwrap_model(chunk).decoder.layers]
    meet_peers()
    try:
        note()
        losses = chunk(tokens, position_ids=None, attention_mask=None, labels=labels)
        note()
    finally:
        for hook in hooks:
            hook.remove()
    del losses
    before, *_, last_but_one, last, after = allocated    # there are two layers or more
    return {"kept_gib": (after - before) / 2**30, "kept_gib_a_layer": (last - last_but_one) / 2**30}


@contextlib.contextmanager
def only_accumulating(chunks: list[Any]) -> Iterator[None]:
    """A micro-batch within is as one that others follow: its gradients are neither reduced nor finished."""
    from megatron.core.utils import get_model_config

    engine = get_model_config(chunks[0])
    finish, no_sync = engine.finalize_model_grads_func, engine.no_sync_func
    engine.finalize_model_grads_func = engine.no_sync_func = None
    try:
        with contextlib.ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        engine.finalize_model_grads_func, engine.no_sync_func = finish, no_sync


def timed(arm: Arm, call: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each call, from an idle device to an idle device; of the slowest rank."""
    import torch
    import torch.distributed as dist

    taken = []
    for _ in range(times):
        arm.synchronize()
        if arm.place.world_size > 1:
            dist.barrier()
            arm.synchronize()
        begin = time.perf_counter()
        call()
        arm.synchronize()
        taken.append((time.perf_counter() - begin) * 1e3)
    slowest = torch.tensor(taken, dtype=torch.float64, device=arm.place.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def rates(arm: Arm, spec: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Tokens and floating-point operations a second of one GPU, and their share of its peak."""
    import statistics

    from megatron.pretrain.model.flops import flops_per_token, padded_vocab_size, peak_tflops

    shape = shape_of(spec)
    vocabulary = padded_vocab_size(shape.vocab_size, 128, spec["tp"])
    flops = flops_per_token(arm.config.model, shape.seq_length, vocabulary)
    peak = peak_tflops(values["device"], "bf16" if spec["recipe"] is None else "fp8")
    found: dict[str, Any] = {"peak_tflops": peak}
    for part in ("fb", "step"):
        if f"{part}_ms" in values:
            seconds = statistics.median(values[f"{part}_ms"]) / 1e3
            tokens = spec["micro_batch"] * shape.seq_length / seconds / spec["tp"]
            found |= {f"{part}_tokens_per_s": tokens, f"{part}_tflops": tokens * flops / 1e12,
                      f"{part}_mfu": tokens * flops / 1e12 / peak if peak else None}
    return found


def _kind_of(optimizer: Any) -> str:
    """The class that updates the weights, under the engine's wrappers."""
    while hasattr(optimizer, "chained_optimizers"):
        optimizer = optimizer.chained_optimizers[0]
    inner = getattr(optimizer, "optimizer", optimizer)
    return f"{type(inner).__module__}.{type(inner).__name__}"


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
