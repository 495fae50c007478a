"""Where the GPU's time goes: kernels grouped by their names into the parts of a training step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# The first pattern that is found names the part: attention's and norm's kernels are written in CuTe too, and
# their names say so, so they come before the products.
PARTS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|gloo|symmetric_memory|memcpy ptop"),
    ("attention", r"flash_?att|flash_(fwd|bwd)|sdpa|fmha|fprop|bprop|attention"),
    ("loss", r"cross_?entropy|online_softmax|element_mul|nll_loss|soft_?max(for|back)ward|log_softmax"),
    ("optimizer", r"adam|multi_?tensor|l2_?norm|foreach|lpnorm"),
    ("norm", r"rms_?norm|layer_?norm|rmsreduce|::normalization::"),
    ("rope", r"(^|[^a-z]|fused)rope|rotary"),
    ("fp8 casts", r"(^|[ :_])(quantize|cast|amax|transpose)|scaling_recipe|compute_scale|float8"),
    ("products", r"nvjet|gemm|gemv|cutlass|wgmma|xmma|splitkreduce|addmm|aten::(mm|bmm)\b|cublas"),
    ("activation", r"swiglu|silu|glu\b|gated|d?act_kernel|gelu|sigmoid"),
    ("copies", r"memcpy|memset|copy|catarray|contiguous|fill|zero_"),
)
# Fused casts say what they compute as well: the function counts, not the number format it ends in.
GATED_CAST = re.compile(r"(swiglu|gated)_?(cast|quantize)|(cast|quantize)_?(swiglu|gated)", re.IGNORECASE)
PATTERNS = tuple((part, re.compile(pattern, re.IGNORECASE)) for part, pattern in PARTS)
OTHER = "other"
ORDER = (*(part for part, _ in PARTS), OTHER)


@dataclass(frozen=True)
class Span:
    """One kernel's run on the device, in microseconds."""

    name: str
    start_us: float
    end_us: float


def part_of(kernel: str) -> str:
    """The part of a training step that a kernel of this name works on."""
    if GATED_CAST.search(kernel):
        return "activation"
    return next((part for part, pattern in PATTERNS if pattern.search(kernel)), OTHER)


def busy_us(spans: Iterable[Span]) -> float:
    """Time in which at least one of the spans runs."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda one: one.start_us):
        if span.end_us > reached:
            busy += span.end_us - max(span.start_us, reached)
            reached = span.end_us
    return busy


def summarize(spans: Sequence[Span], wall_us: float, steps: int) -> dict[str, Any]:
    """Milliseconds a step: of each part, of the ten longest kernels, of no kernel at all."""
    parts: Counter[str] = Counter()
    names: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for span in spans:
        parts[part_of(span.name)] += span.end_us - span.start_us
        names[span.name] += span.end_us - span.start_us
        calls[span.name] += 1
    ms = 1e-3 / steps
    busy = busy_us(spans)
    return {
        "parts_ms": {part: parts[part] * ms for part in ORDER if part in parts},
        "longest": [{"name": name, "part": part_of(name), "ms": total * ms, "calls": calls[name] / steps}
                    for name, total in names.most_common(10)],
        "wall_ms": wall_us * ms, "busy_ms": busy * ms, "idle_ms": (wall_us - busy) * ms}


def profile(step: Callable[[], object], synchronize: Callable[[], object], *, on_gpu: bool,
            steps: int = 3) -> dict[str, Any]:
    """`summarize` of some steps; without a GPU, of the operators of torch."""
    import time

    import torch
    from torch.profiler import ProfilerActivity

    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    # The first use of the profiler sets itself up within the step it looks at: that one is not looked at.
    with torch.profiler.profile(activities=[activity]):
        step()
        synchronize()
    with torch.profiler.profile(activities=[activity]) as recorded:
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        wall_us = (time.perf_counter() - begin) * 1e6
    return summarize(_kernels(recorded.events()) if on_gpu else _operators(recorded.events()), wall_us, steps)


def _kernels(events: Iterable[Any]) -> list[Span]:
    """What ran on the GPU. The profiler also lays named ranges of the program over the kernels: not those."""
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in events
            if event.device_type.name == "CUDA" and not _is_label(event)]


def _operators(events: Iterable[Any]) -> list[Span]:
    """What ran on the CPU, each operator without those that it calls."""
    return [Span(event.name, event.time_range.start, event.time_range.start + event.self_cpu_time_total)
            for event in events if event.device_type.name == "CPU" and not _is_label(event)]


def _is_label(event: Any) -> bool:
    labels = ("ProfilerStep", "Optimizer.", "nccl:")
    return getattr(event, "is_user_annotation", False) or event.name.startswith(labels)


def as_markdown(title: str, summary: dict[str, Any]) -> str:
    """The parts of a profile, and its longest kernels, as two tables."""
    busy = summary["busy_ms"]
    lines = [f"{title}: {summary['wall_ms']:.1f} ms a step, the device is busy {busy:.1f} ms and idle "
             f"{summary['idle_ms']:.1f} ms; parts overlap where streams do.", "",
             "| part | ms a step | of busy |", "|---|---|---|"]
    lines += [f"| {part} | {ms:.2f} | {ms / busy:.1%} |" for part, ms in sorted(
        summary["parts_ms"].items(), key=lambda item: -item[1])]
    lines += ["", "| longest kernels | part | ms a step | calls a step |", "|---|---|---|---|"]
    lines += [f"| `{one['name'][:90].replace('|', '/')}` | {one['part']} | {one['ms']:.2f} | "
              f"{one['calls']:g} |"
              for one in summary["longest"]]
    return "\n".join(lines)
