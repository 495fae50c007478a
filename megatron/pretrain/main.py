"""The whole of pretrain_gpt.py: read flags, show the plan, open inputs, take a place, assemble, train."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from megatron.pretrain import cli
from megatron.pretrain.checks import settle
from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import EXIT_USER_ERROR, UserError
from megatron.pretrain.plan import plan_lines
from megatron.pretrain.train.inputs import Inputs, open_inputs


def main(argv: Sequence[str]) -> int:
    """Run one rank of a training run, or print its plan with --dry-run. Returns the exit code."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    _set_up_logging(is_main=rank == 0)
    try:
        invocation = cli.parse(argv)
        world_size = world_size_of_environment()
        config = settle(invocation.config, world_size)
        lines = plan_lines(config, world_size)
        if rank == 0:
            print("\n".join(lines), flush=True)
        inputs = None if invocation.dry_run else open_inputs(config)
    except UserError:
        # Processes of one machine see the same flags and files: the first says what is wrong with them.
        if local_rank == 0:
            raise
        return EXIT_USER_ERROR
    if inputs is not None:
        _train(config, inputs)
    return 0


def world_size_of_environment() -> int:
    """Processes that torchrun started; 1 without it. Raises UserError for a malformed WORLD_SIZE."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"WORLD_SIZE={value!r} in the environment: must be the number of processes")
    return int(value)


def _train(config: RunConfig, inputs: Inputs) -> None:
    # The engine takes seconds to import, which neither --help, --dry-run nor a mistake should wait for.
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
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
