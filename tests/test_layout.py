"""How processes find each other, with real ones."""

from __future__ import annotations

import socket

ALONE = """
import sys
from megatron.pretrain.checks import settle
from megatron.pretrain.cli import parse
from megatron.pretrain.layout import placed

with placed(settle(parse(sys.argv[1:]).config, world_size=1)) as place:
    print(f"rank {place.rank} of {place.world_size}")
"""
SHAPE = ("--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 1 --seq-length 8 "
         "--micro-batch-size 1 --train-iters 1 --lr 0.1").split()


def test_a_process_alone_leaves_the_shells_port_to_another_run(run_tool):
    with socket.create_server(("", 0)) as another_run:
        said = run_tool("-c", ALONE, *SHAPE, env={
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(another_run.getsockname()[1])})
    assert said.returncode == 0, said.stderr
    assert said.stdout == "rank 0 of 1\n"
