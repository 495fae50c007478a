"""How far the parts of a training step are from what the machine allows, kernel by kernel."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kernel_attention as attention
import kernel_bytes as others
import kernel_gate as gate
import kernel_products as products
import torch
from environment import as_line, machine, versions
from kernel_parts import Part, Setting
from models import MODELS
from rich.console import Console
from rich.progress import track
from torch import Tensor

# In bf16 a right result is within one hundredth of fp64's.
TOLERANCE = 0.03
FLUSH_BYTES = 256 << 20
HEAD_START_CYCLES = 20_000_000  # about 10 ms
DESCRIPTION = """\
Measure every part of a NEO model's training step for itself, at the model's shapes, by each kernel that can
do it, beside the floor of that part: the longer of its operations at the rate of a large product and of its
bytes at the rate of a large copy, both measured first. Before it is timed, a kernel's result is compared
with fp64 on some of its rows; one that is wrong or not finite is a failure and is not timed. A time is the
median of single calls, each after the cache was flushed, --seconds of them, all candidates in turn, twice.
A candidate `project: ...` is what the fused layers call.

Single calls find a GPU cool and fast. In a step it is at its power limit, where the kernel is fastest that takes
the least energy: --sustained times three loops of --seconds, each after a third of it to get there. Of parts
that take less than a tenth of a millisecond it finds how fast Python launches them."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: floating-point operations a second, and bytes read plus written a second."""

    flops: float
    bytes: float

    def floor_ms(self, part: Part) -> float:
        """The least time that a part can take."""
        return max(part.flops / self.flops, part.bytes / self.bytes) * 1e3


def main() -> int:
    flags = _parse()
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = MODELS[flags.model]
    setting = Setting(shape, flags.micro_batch * shape.seq_length, device, flags.all_tiles)
    torch.manual_seed(0)
    timer = (SustainedTimer if flags.sustained else Timer)(device, flags.seconds)
    ceilings = measure_ceilings(timer, small=flags.model == "tiny")
    name = torch.cuda.get_device_name() if setting.on_gpu else "CPU"
    print(f"{flags.model}, {setting.tokens} tokens; {name}, {as_line(machine())}\n{as_line(versions())}\n"
          f"product {ceilings.flops / 1e12:.4g} TFLOP/s, copy {ceilings.bytes / 1e12:.3g} TB/s\n", flush=True)
    results = {"model": flags.model, "tokens": setting.tokens, "device": name, "machine": machine(),
               "versions": versions(), "ceilings": dataclasses.asdict(ceilings), "parts": []}
    print(_row("part", "candidate", "ms (least - greatest)", "TFLOP/s", "TB/s", "floor ms", "times floor",
               "error", "first call s"))
    print(_row(*["---"] * 9), flush=True)
    console = Console(stderr=True)
    wanted = {part: make for part, make in all_parts(setting).items()
              if not flags.only or any(word in part for word in flags.only)}
    for part, make in track(wanted.items(), "measuring", console=console, disable=not console.is_terminal):
        results["parts"].append(measure_part(part, make, timer, ceilings))
        if flags.json:
            flags.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n" + summary(results["parts"]), flush=True)
    return 1 if any(part["failed"] for part in results["parts"]) else 0


def all_parts(setting: Setting) -> dict[str, Callable[[], Part]]:
    """Every part by its name, in the order of a step; built with its inputs when it is called."""
    shape = setting.shape
    context = shape.num_attention_heads * shape.kv_channels
    heads = context + 2 * shape.num_query_groups * shape.kv_channels
    linear: dict[str, Callable[[], Part]] = {}
    for name, inputs, outputs, times in (
            ("qkv", shape.hidden_size, heads, shape.num_layers),
            ("proj", context, shape.hidden_size, shape.num_layers),
            ("fc2", shape.ffn_hidden_size, shape.hidden_size, shape.num_layers),
            ("head", shape.hidden_size, shape.vocab_size, 1)):
        ways = {"forward": products.product_forward, "input gradient": products.product_input_gradient,
                "weight gradient": products.product_weight_gradient}
        linear |= {f"{name} {way}": partial(build, setting, name, inputs, outputs, times)
                   for way, build in ways.items()}
    # With the gate's derivative it is "fc2 + gate backward".
    del linear["fc2 input gradient"]
    return linear | {name: partial(build, setting) for name, build in {
        "fc1 + gate forward": gate.gate_forward, "fc2 + gate backward": gate.gate_backward,
        "fc1 input gradient": gate.fc1_input_gradient, "fc1 weight gradient": gate.fc1_weight_gradient,
        "attention forward": attention.attention_forward, "attention backward": attention.attention_backward,
        "norm forward": others.norm_forward, "norm backward": others.norm_backward, "rope": others.rope,
        "loss forward": others.loss_forward, "loss backward": others.loss_backward,
        "Adam": others.adam}.items()}


class Timer:
    """Milliseconds of single calls, by the device's own clock where it has one."""

    rounds = 2

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self._seconds = seconds
        self._on_gpu = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self._on_gpu else 0, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def calls_ms(self, call: Callable[[], object]) -> list[float]:
        """The time of each of about `seconds` worth of calls, 5 to 200 of them, after two to warm up."""
        one_ms = statistics.mean(self._timed(call, 2))
        return self._timed(call, min(200, max(5, int(self._seconds * 1e3 / max(one_ms, 1e-3)))))

    def _timed(self, call: Callable[[], object], times: int) -> list[float]:
        if not self._on_gpu:
            return [_seconds_of(call) * 1e3 for _ in range(times)]
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        # The device waits while the host runs ahead: what is timed is not how fast Python launches.
        torch.cuda._sleep(HEAD_START_CYCLES)
        for begin, end in marks:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]


class SustainedTimer(Timer):
    """Milliseconds of a call among calls like it, for so long that a GPU is as warm and as slow as in a step."""

    rounds = 3

    def calls_ms(self, call: Callable[[], object]) -> list[float]:
        """The mean of about `seconds` worth of calls, three at least."""
        times = max(3, int(self._seconds * 1e3 / max(statistics.mean(self._timed(call, 2)), 1e-3)))
        self._loop_ms(call, times // 3)
        return [self._loop_ms(call, times) / times]

    def _loop_ms(self, call: Callable[[], object], times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e3


def measure_ceilings(timer: Timer, *, small: bool) -> Ceilings:
    """A product of 8192 x 8192 x 8192 random bf16 numbers, and a copy that reads and writes 8 GB in all."""
    size, count = (256, 1 << 20) if small else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=timer.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    product_ms = statistics.median(timer.calls_ms(lambda: torch.mm(left, right, out=out)))
    source = torch.randn(count, device=timer.device)
    target = torch.empty_like(source)
    copy_ms = statistics.median(timer.calls_ms(lambda: target.copy_(source)))
    return Ceilings(2 * size ** 3 / product_ms * 1e3, 2 * source.nbytes / copy_ms * 1e3)


def measure_part(name: str, make: Callable[[], Part], timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """Check and time every candidate of a part, and print its rows. What fails does not stop the rest."""
    found: dict[str, Any] = {"part": name, "failed": {}, "candidates": {}, "left_out": []}
    try:
        part = make()
    except Exception as error:
        _fail(found, "inputs", error)
        return found
    found |= {"times": part.times, "flops": part.flops, "bytes": part.bytes,
              "floor_ms": ceilings.floor_ms(part), "left_out": part.left_out}
    try:
        reference = part.reference()
        for candidate, call in part.candidates.items():
            _guarded(found, candidate, lambda: found["candidates"].update(
                {candidate: {**_checked(part, call, reference, timer), "ms": []}}))
        for _ in range(timer.rounds):
            for candidate in list(found["candidates"]):
                times = found["candidates"][candidate]["ms"]
                _guarded(found, candidate, lambda: times.extend(timer.calls_ms(part.candidates[candidate])))
    except Exception as error:
        _fail(found, "reference", error)
    del part
    _clean_up(timer)
    _print_part(found)
    return found


def _checked(part: Part, call: Callable[[], Any], reference: Tensor, timer: Timer) -> dict[str, float]:
    """The first call's seconds, compiling included, and the relative error. ArithmeticError if wrong."""
    part.fresh()
    timer.synchronize()
    begin = time.perf_counter()
    outputs = call()
    timer.synchronize()
    first_s = time.perf_counter() - begin
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    if not all(bool(one.isfinite().all()) for one in tensors if isinstance(one, Tensor)):
        raise ArithmeticError("its result is not finite")
    picked = part.picked(outputs).double()
    error = float((picked - reference).norm() / reference.norm())
    if not error < TOLERANCE:
        raise ArithmeticError(f"its result differs from fp64's by {error:.2g}")
    return {"first_call_s": first_s, "error": error}


def _guarded(found: dict[str, Any], candidate: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:
        found["candidates"].pop(candidate, None)
        _fail(found, candidate, error)


def _fail(found: dict[str, Any], candidate: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    found["failed"][candidate] = {"reason": reason, "traceback": traceback.format_exc()}
    print(f"FAILED {found['part']}, {candidate}: {reason}", flush=True)


def _clean_up(timer: Timer) -> None:
    """Give the part's memory back before the next one is built."""
    gc.collect()
    if timer.device.type == "cuda":
        torch.cuda.empty_cache()


def _print_part(found: dict[str, Any]) -> None:
    for name, one in sorted(found["candidates"].items(), key=lambda item: statistics.median(item[1]["ms"])):
        ms, floor = statistics.median(one["ms"]), found["floor_ms"]
        print(_row(found["part"], name, f"{ms:.3f} ({min(one['ms']):.3f} - {max(one['ms']):.3f})",
                   f"{found['flops'] / ms / 1e9:.4g}" if found["flops"] else "-",
                   f"{found['bytes'] / ms / 1e9:.3g}", f"{floor:.3f}", f"{ms / floor:.2f}",
                   f"{one['error']:.1e}", f"{one['first_call_s']:.1f}"), flush=True)


def summary(parts: list[dict[str, Any]]) -> str:
    """What one step of the whole model takes, part for part: at the floor, and by the fastest candidates."""
    done = [part for part in parts if part["candidates"]]
    floor = sum(part["times"] * part["floor_ms"] for part in done)
    best = sum(part["times"] * min(statistics.median(one["ms"]) for one in part["candidates"].values())
               for part in done)
    notes = sorted({note for part in parts for note in part["left_out"]})
    lines = [f"All layers, a micro-batch, and Adam on one GPU: floor {floor:.1f} ms, fastest candidates "
             f"{best:.1f} ms ({best / floor:.2f} times the floor; {len(done)} of {len(parts)} parts)." if done
             else "Nothing was measured."]
    return "\n".join(lines + [f"left out: {note}" for note in notes])


def _seconds_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b", help="(default: 7b; tiny is for CPUs)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts with one of these in their names")
    parser.add_argument("--all-tiles", action="store_true", help="every tile of quack's products, not three")
    parser.add_argument("--sustained", action="store_true", help="loops of calls, as in a step, not single ones")
    parser.add_argument("--seconds", type=float, help="of calls of each (default: 0.15, sustained 0.6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    flags = parser.parse_args()
    if flags.seconds is None:
        flags.seconds = 0.6 if flags.sustained else 0.15
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    if flags.micro_batch < 1:
        parser.error(f"--micro-batch {flags.micro_batch}: must be 1 or more")
    if flags.json and not flags.json.resolve().parent.is_dir():
        parser.error(f"--json {flags.json}: its folder does not exist")
    return flags


if __name__ == "__main__":
    sys.exit(main())
