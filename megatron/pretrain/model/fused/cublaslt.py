"""cuBLASLt's fp8 product, called through ctypes for two things that torch does not offer.

It adds to a matrix: `torch._scaled_mm` writes its result, and adding that to an accumulator afterwards moves 10 bytes
a weight more. And it takes the fastest of the algorithms that cuBLASLt proposes: the first of them, which torch takes,
was up to 19 % slower in the forward products of NEO on an H200. Numbers below are cublasLt.h's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper
PROPOSALS, COMPARED_ROWS, TRIALS, CALLS = 8, 256, 3, 3

CUDA_TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
COMPUTE_32F = 68
OP_T = 1
DESC_TRANSA, DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER, DESC_FAST_ACCUM = 3, 17, 18, 25
PREF_MAX_WORKSPACE_BYTES, PREF_MIN_ALIGNMENT = 1, {"a": 5, "b": 6, "c": 7, "d": 8}

_Pointer = ctypes.c_void_p


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (("algorithm", _Algorithm), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4))


@dataclass(frozen=True)
class _Problem:
    """What cuBLASLt chooses an algorithm by; a is [rows, depth], b [columns, depth], out [rows, columns]."""

    device: int
    rows: int
    columns: int
    depth: int
    a_type: torch.dtype
    b_type: torch.dtype
    out_type: torch.dtype
    fast_accumulation: bool
    a_alignment: int
    b_alignment: int
    added_alignment: int
    out_alignment: int


@dataclass
class _Plan:
    """A problem's descriptors, kept for the life of the process, and the algorithm for it."""

    description: _Pointer
    first: _Pointer
    second: _Pointer
    result: _Pointer
    algorithms: list[_Algorithm]
    """Those proposed; once one was chosen, that one."""


def add_product(added: Tensor, a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, out: Tensor, *,
                fast_accumulation: bool, replace: bool = False) -> None:
    """out = added + (a @ b^T) * a_inverse * b_inverse, on the current stream; out may be added itself.

    With `replace` the numbers of `added` do not count and are not read.

    added and out [rows, columns] are both fp32 or both bf16, a [rows, depth] and b [columns, depth] are fp8
    (e5m2 at most in one of them), all contiguous; the inverses are fp32 scalars on the device. Without
    `fast_accumulation` sums are promoted to fp32 as they grow. The first product of a shape that does not add to
    its own output tries several algorithms (`_fastest`), which takes up to 0.2 s. Raises RuntimeError where cuBLASLt
    has no algorithm for the shapes.
    """
    rows, columns, depth = a.size(0), b.size(0), a.size(1)
    if not (b.size(1) == depth and out.shape == added.shape == (rows, columns) and out.dtype == added.dtype):
        raise ValueError(f"{list(out.shape)} {out.dtype} = {list(added.shape)} {added.dtype} + "
                         f"{list(a.shape)} @ {list(b.shape)}^T")
    device = out.get_device()
    plan = _plan(_Problem(device, rows, columns, depth, a.dtype, b.dtype, out.dtype, fast_accumulation,
                          *(_alignment(tensor) for tensor in (a, b, added, out))))
    # cuBLASLt's matrices are stored by columns: its result is out^T = b @ a^T, its first operand is b.
    _set(plan.description, DESC_A_SCALE_POINTER, _Pointer(b_inverse.data_ptr()))
    _set(plan.description, DESC_B_SCALE_POINTER, _Pointer(a_inverse.data_ptr()))
    stream = torch.cuda.current_stream(device).cuda_stream
    one, share = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0 if replace else 1))

    def multiply(algorithm: _Algorithm) -> None:
        _call("cublasLtMatmul", _handle(device), plan.description, one, _Pointer(b.data_ptr()), plan.first,
              _Pointer(a.data_ptr()), plan.second, share, _Pointer(added.data_ptr()), plan.result,
              _Pointer(out.data_ptr()), plan.result, ctypes.byref(algorithm),
              _Pointer(_workspace(device, stream).data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
              _Pointer(stream))

    repeatable = replace or added.data_ptr() != out.data_ptr()
    with torch.cuda.device(device):
        if len(plan.algorithms) > 1 and repeatable and not torch.cuda.is_current_stream_capturing():
            plan.algorithms = [_fastest(plan.algorithms, multiply, out)]
        multiply(plan.algorithms[0])


def _fastest(algorithms: Sequence[_Algorithm], multiply: Callable[[_Algorithm], None], out: Tensor) -> _Algorithm:
    """The algorithm of the least time, of those whose result has the first one's bits.

    So the choice, which noise may decide, and which other ranks and runs may make in another way, is none of numbers:
    tiles differ, the order of a sum does not. Those that cut a sum are left out.
    """
    compared = out[::max(1, out.size(0) // COMPARED_ROWS)].view(torch.int16)
    multiply(algorithms[0])
    expected, equal = compared.clone(), [algorithms[0]]
    for algorithm in algorithms[1:]:
        multiply(algorithm)
        if torch.equal(compared, expected):
            equal.append(algorithm)
    spent_ms = [[_milliseconds(partial(multiply, algorithm)) for algorithm in equal] for _ in range(TRIALS)]
    least_ms = [min(trials) for trials in zip(*spent_ms, strict=True)]
    return equal[least_ms.index(min(least_ms))]


def _milliseconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@cache
def _plan(problem: _Problem) -> _Plan:
    description = _Pointer()
    _call("cublasLtMatmulDescCreate", ctypes.byref(description), COMPUTE_32F, CUDA_TYPES[torch.float32])
    _set(description, DESC_TRANSA, ctypes.c_int32(OP_T))
    _set(description, DESC_FAST_ACCUM, ctypes.c_int8(problem.fast_accumulation))
    # The heuristic must know that there are scales; which ones is said with each product.
    scale = torch.ones((), device=problem.device)
    for attribute in (DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER):
        _set(description, attribute, _Pointer(scale.data_ptr()))
    first = _layout(problem.b_type, problem.depth, problem.columns)
    second = _layout(problem.a_type, problem.depth, problem.rows)
    result = _layout(problem.out_type, problem.columns, problem.rows)
    return _Plan(description, first, second, result, _proposals(problem, description, first, second, result))


def _proposals(problem: _Problem, description: _Pointer, first: _Pointer, second: _Pointer,
               result: _Pointer) -> list[_Algorithm]:
    """Algorithms, in the order of cuBLASLt's guess."""
    preference = _Pointer()
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    wishes = {PREF_MAX_WORKSPACE_BYTES: ctypes.c_uint64(WORKSPACE_BYTES)}
    alignments = {"a": problem.b_alignment, "b": problem.a_alignment, "c": problem.added_alignment,
                  "d": problem.out_alignment}
    wishes.update({PREF_MIN_ALIGNMENT[name]: ctypes.c_uint32(value) for name, value in alignments.items()})
    for attribute, value in wishes.items():
        _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value),
              ctypes.c_size_t(ctypes.sizeof(value)))
    guesses, found = (_Heuristic * PROPOSALS)(), ctypes.c_int(0)
    _call("cublasLtMatmulAlgoGetHeuristic", _handle(problem.device), description, first, second, result,
          result, preference, PROPOSALS, guesses, ctypes.byref(found))
    _call("cublasLtMatmulPreferenceDestroy", preference)
    algorithms = [guess.algorithm for guess in guesses[:found.value] if not guess.state]
    if not algorithms:
        raise RuntimeError(f"cuBLASLt has no algorithm for {problem}")
    return algorithms


def _layout(dtype: torch.dtype, height: int, width: int) -> _Pointer:
    """A matrix stored by columns, without gaps."""
    layout = _Pointer()
    _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), CUDA_TYPES[dtype], ctypes.c_uint64(height),
          ctypes.c_uint64(width), ctypes.c_int64(height))
    return layout


def _set(description: _Pointer, attribute: int, value: ctypes._SimpleCData) -> None:
    _call("cublasLtMatmulDescSetAttribute", description, attribute, ctypes.byref(value),
          ctypes.c_size_t(ctypes.sizeof(value)))


def _alignment(tensor: Tensor) -> int:
    """The largest power of two, up to 256, that divides the address."""
    address = tensor.data_ptr()
    return min(address & -address, 256)


@cache
def _handle(device: int) -> _Pointer:
    handle = _Pointer()
    with torch.cuda.device(device):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


@cache
def _workspace(device: int, stream: int) -> Tensor:
    """A stream's own: products of one stream follow each other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded: its name without a path finds it."""
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _call(function: str, *arguments: object) -> None:
    status = getattr(_library(), function)(*arguments)
    if status:
        raise RuntimeError(f"{function} failed with status {status}")
