"""The whole of pretrain_gpt.py: read flags, show the plan, open inputs, take a place, assemble, train."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence

from megatron.pretrain import cli
from megatron.pretrain.checks import settle
from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.plan import plan_lines
from megatron.pretrain.train.inputs import Inputs, open_inputs

# Long enough for a machine under load to let another process speak first.
_GRACE_S = 20.0


def main(argv: Sequence[str]) -> int:
    """Run one rank of a training run, or print its plan with --dry-run. Returns the exit code."""
    try:
        _run(argv)
    except UserError:
        # Processes of one machine mostly make the same mistake. The first tells it, and torchrun ends the
        # others with it; where it did not make that mistake, they tell it themselves.
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(_GRACE_S)
        raise
    return 0


def _run(argv: Sequence[str]) -> None:
    is_main = int(os.environ.get("RANK", "0")) == 0
    _set_up_logging(is_main=is_main)
    invocation = cli.parse(argv)
    world_size = world_size_of_environment()
    config = settle(invocation.config, world_size)
    if is_main:
        print("\n".join(plan_lines(config, world_size)), flush=True)
    if not invocation.dry_run:
        _train(config, open_inputs(config))


def world_size_of_environment() -> int:
    """Processes that torchrun started; 1 without it. Raises UserError for a malformed WORLD_SIZE."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"WORLD_SIZE={value!r} in the environment: must be the number of processes")
    return int(value)


def _train(config: RunConfig, inputs: Inputs) -> None:
    # The engine takes seconds to import, which neither --help, --dry-run nor a mistake should wait for.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    # The engine looks at .grad of views of its buffers, on purpose; the warning names our file, not its own.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from megatron.pretrain.layout import placed
    from megatron.pretrain.train.report import Reporter
    from megatron.pretrain.train.run import assemble
    from megatron.pretrain.train.trainer import train

    with placed(config) as place:
        run = assemble(config, place, inputs)
        with Reporter(run) as reporter:
            train(run, reporter)


def _set_up_logging(*, is_main: bool) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("megatron.pretrain")
    ours.addHandler(handler)
    ours.propagate = False
    ours.setLevel(logging.INFO if is_main else logging.WARNING)
    # The engine reports every setting of every object at INFO.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
