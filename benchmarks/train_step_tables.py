"""The tables of benchmarks/train_step.py, from the raw figures that it measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from environment import as_line
from profile_parts import as_markdown

Run = dict[str, Any]


def show(results: dict[str, Any]) -> str:
    """All of it in Markdown: what was measured where, the arms, their ratios, their profiles."""
    runs = results["runs"]
    parts = [_heading(results), _arms(results), _ratios(results)]
    parts += [f"{label}: left out: {reason}" for label, reason in results["left_out"].items()]
    parts += [f"FAILED {run['arm']} {run['precision']}, round {run['round'] + 1}, {part}: {failure['reason']}"
              for run in runs for part, failure in run["failed"].items()]
    parts += [as_markdown(f"{run['arm']} {run['precision']}", run["profile"])
              for run in runs if "profile" in run]
    return "\n\n".join(parts)


def _heading(results: dict[str, Any]) -> str:
    settings = results["settings"]
    built = [run for run in results["runs"] if "versions" in run]
    layers = "all layers" if settings["layers"] is None else f"{settings['layers']} layers"
    lines = [f"{settings['model']}, {layers}, micro-batch {settings['micro_batch']}, TP {settings['tp']}, "
             f"DP {settings['dp']}, {settings['rounds']} rounds of {settings['steps']} calls"]
    if built:
        lines += [f"{built[0]['device']}, {as_line(results['machine'])}", as_line(built[0]["versions"])]
        optimizers = {f"{run['arm']}: {run['optimizer']}" for run in built}
        lines.append(f"optimizers: {', '.join(sorted(optimizers))}")
    return "\n".join(f"{line}  " for line in lines)


def _arms(results: dict[str, Any]) -> str:
    rows = [["arm", "precision", "fb ms (least - greatest)", "step ms", "optimizer ms", "tokens/s/GPU (fb)",
             "TFLOP/s (fb)", "MFU (fb)", "MFU (step)", "peak GiB", "activations GiB (a layer)", "start-up s",
             "loss"]]
    for arm in results["arms"]:
        runs = _runs_of(results, arm)
        if not runs:
            continue
        rows.append([arm["name"], arm["precision"], _spread(map(_median_of("fb_ms"), runs), "{:.1f}"),
                     _spread(map(_median_of("step_ms"), runs), "{:.1f}"),
                     _spread(map(_median_of("optimizer_ms"), runs), "{:.1f}"),
                     _median(runs, "fb_tokens_per_s", "{:,.0f}"), _median(runs, "fb_tflops", "{:.3g}"),
                     _median(runs, "fb_mfu", "{:.1%}"), _median(runs, "step_mfu", "{:.1%}"),
                     _median(runs, "peak_gib", "{:.1f}"),
                     f"{_median(runs, 'kept_gib', '{:.1f}')} ({_median(runs, 'kept_gib_a_layer', '{:.2f}')})",
                     _spread((run.get("start_s", {}).get("first_step") for run in runs), "{:.1f}"),
                     _median(runs, "loss", "{:.3f}")])
    return _table(rows) if len(rows) > 1 else "Nothing was measured."


def _ratios(results: dict[str, Any]) -> str:
    """How many times faster than the reference: of runs in the same round, then over the rounds."""
    against = results["settings"]["against"]
    rows = [["arm", "precision", "fb", "step", "optimizer"]]
    for arm in results["arms"]:
        reference = {run["round"]: run for run in results["runs"]
                     if run["arm"] == against and run["precision"] == arm["precision"]}
        if arm["name"] == against or not reference or not _runs_of(results, arm):
            continue
        rows.append([arm["name"], arm["precision"]])
        for part in ("fb_ms", "step_ms", "optimizer_ms"):
            median = _median_of(part)
            pairs = [(median(reference[run["round"]]), median(run)) for run in _runs_of(results, arm)
                     if run["round"] in reference]
            rows[-1].append(_spread((theirs / ours for theirs, ours in pairs if theirs and ours), "{:.3f}"))
    if len(rows) == 1:
        return f"No ratios: no other arm was measured beside one of {against} in its precision (--against)."
    return f"Times faster than {against} (least - greatest over the rounds):\n\n{_table(rows)}"


def _runs_of(results: dict[str, Any], arm: dict[str, str]) -> list[Run]:
    return [run for run in results["runs"]
            if run["arm"] == arm["name"] and run["precision"] == arm["precision"]]


def _median_of(name: str) -> Callable[[Run], float | None]:
    return lambda run: statistics.median(run[name]) if run.get(name) else None


def _median(runs: Sequence[Run], name: str, form: str) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    return form.format(statistics.median(values)) if values else "-"


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, least, greatest = (form.format(pick(known)) for pick in (statistics.median, min, max))
    return f"{middle} ({least} - {greatest})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
