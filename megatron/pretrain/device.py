"""What megatron-core needs to run on CPUs with gloo; never installed where CUDA is present.

The engine says 'cuda' literally in a few places: as a device of new tensors, as the owner of random
states, as part of a tensor's type name. On a machine without CUDA these few lines answer in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as engine_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextlib.contextmanager
def engine_on_cpu() -> Iterator[None]:
    """Let megatron-core run on CPU within this context, in the calling thread.

    The redirection of the literal device 'cuda' is thread-local (a TorchFunctionMode is), so loader
    threads must not create tensors through the engine. Raises RuntimeError where CUDA is present.
    """
    if torch.cuda.is_available():
        raise RuntimeError("CUDA is present: the CPU stand-ins would hide it")
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *_: None
    # megatron-core 0.19 asks for the stream that CUDA graphs would have it wait on; there are none.
    torch.cuda.current_stream = lambda *_: None
    engine_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    engine_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    engine_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    engine_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    with _CudaMeansCpu():
        yield


class _CudaMeansCpu(TorchFunctionMode):
    """Sends `device='cuda'` to the CPU and answers type-name tests as a CUDA tensor would."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


class CpuRngTracker(engine_random.CudaRNGStatesTracker):
    """Named random states, as the engine's tracker keeps them, of the CPU's generator."""

    def add(self, name: str, seed: int) -> None:
        """Remember under `name` the state that `seed` gives."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} or seed {seed} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        generator = torch.Generator()
        generator.manual_seed(seed)
        self.states_[name] = generator.get_state()

    @contextlib.contextmanager
    def fork(self, name: str = engine_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the state `name` within this context, and continue there next time."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)
