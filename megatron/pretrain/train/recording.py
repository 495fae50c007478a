"""Forward and backward of a micro-batch as CUDA graphs: recorded once, then replayed without the host's work.

What a micro-batch does is the same every time, but for the numbers it reads and two things that a step's first one
does: its gradients replace what is in the accumulators, and it casts weights to fp8. So there are two graphs,
whose activations share one pool of memory.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import Parameter

EAGER_STEPS = 3
"""Before anything is recorded kernels are compiled, products choose their algorithms, fp8's history begins and peers'
memory finds its size."""

logger = logging.getLogger(__name__)


class Recording:
    """Runs micro-batches, those of the first few steps as they are, later ones as graphs.

    The first graph to be recorded is that of a step's first micro-batch: what it leaves for the others of its
    step, such as weights in fp8, must lie in the graphs' own memory when those are recorded.

    `micro_batch(inputs)` runs forward and backward on tensors of the device, reduces nothing, and returns what is
    reported of it. The current stream must be one of the program's own, on which the model was built too: a graph
    can record neither the default stream nor work that a gradient's hook starts there.
    """

    def __init__(self, micro_batch: Callable[[Mapping[str, Tensor]], Tensor], weights: list[Parameter]) -> None:
        self._micro_batch, self._weights = micro_batch, weights
        self._steps = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[str, Tensor] = {}
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One micro-batch on tensors of the host or the device; its report."""
        first = not self._weights[0].grad_added_to_main_grad
        self._steps += first
        if self._steps <= EAGER_STEPS:
            return self._micro_batch({name: _on_gpu(tensor) for name, tensor in inputs.items()})
        if first not in self._graphs:
            self._graphs[first] = self._record(inputs, first)
        graph, report = self._graphs[first]
        for name, tensor in inputs.items():
            if tensor.shape != self._inputs[name].shape:
                raise ValueError(f"{name} {tuple(tensor.shape)}: {tuple(self._inputs[name].shape)} was recorded")
            self._inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        for weight in self._weights:  # as the products' backward pass does, of which a replay runs no Python
            weight.grad_added_to_main_grad = True
        return report.clone()

    def close(self) -> None:
        """Let the graphs go: NCCL waits for ever when it is to leave a group whose collectives a graph still holds."""
        torch.cuda.synchronize()
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _record(self, inputs: Mapping[str, Tensor], first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if not self._inputs:
            self._inputs = {name: _on_gpu(tensor) for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        # Threads that read data may ask the driver for something meanwhile; it is not for the graph.
        with random_states_stay(), torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream(),
                                                    capture_error_mode="thread_local"):
            report = self._micro_batch(self._inputs)
        logger.info("recorded a step's %s as a CUDA graph",
                    "first micro-batch" if first else "later micro-batches")
        return graph, report


@contextlib.contextmanager
def random_states_stay() -> Iterator[None]:
    """Let the engine's switches of random states do nothing: none can be recorded.

    Under sequence parallelism it switches for its layers' dropout, which fused layers do not have.
    """
    tracker = get_cuda_rng_tracker()
    tracker.fork = lambda *_, **__: contextlib.nullcontext()
    try:
        yield
    finally:
        del tracker.fork


def _on_gpu(tensor: Tensor) -> Tensor:
    return tensor.to(torch.cuda.current_device(), non_blocking=True)
