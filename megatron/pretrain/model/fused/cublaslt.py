"""cuBLASLt's fp8 product that adds to a matrix, which torch does not offer: called through ctypes.

`torch._scaled_mm` writes its result; adding it to an accumulator afterwards moves 10 bytes a weight more.
Numbers below are cublasLt.h's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper

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


@dataclass(frozen=True)
class _Plan:
    """A problem's descriptors, kept for the life of the process, and the algorithm for it."""

    description: _Pointer
    first: _Pointer
    second: _Pointer
    result: _Pointer
    algorithm: _Algorithm


def add_product(added: Tensor, a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, out: Tensor, *,
                fast_accumulation: bool, replace: bool = False) -> None:
    """out = added + (a @ b^T) * a_inverse * b_inverse, on the current stream; out may be added itself.

    With `replace` the numbers of `added` do not count and are not read.

    added and out [rows, columns] are both fp32 or both bf16, a [rows, depth] and b [columns, depth] are fp8
    (e5m2 at most in one of them), all contiguous; the inverses are fp32 scalars on the device. Without
    `fast_accumulation` sums are promoted to fp32 as they grow. Raises RuntimeError where cuBLASLt has no
    algorithm for the shapes.
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
    with torch.cuda.device(device):
        _call("cublasLtMatmul", _handle(device), plan.description, one, _Pointer(b.data_ptr()), plan.first,
              _Pointer(a.data_ptr()), plan.second, share, _Pointer(added.data_ptr()), plan.result,
              _Pointer(out.data_ptr()), plan.result, ctypes.byref(plan.algorithm),
              _Pointer(_workspace(device, stream).data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
              _Pointer(stream))


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
    return _Plan(description, first, second, result, _algorithm(problem, description, first, second, result))


def _algorithm(problem: _Problem, description: _Pointer, first: _Pointer, second: _Pointer,
               result: _Pointer) -> _Algorithm:
    preference = _Pointer()
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    wishes = {PREF_MAX_WORKSPACE_BYTES: ctypes.c_uint64(WORKSPACE_BYTES)}
    alignments = {"a": problem.b_alignment, "b": problem.a_alignment, "c": problem.added_alignment,
                  "d": problem.out_alignment}
    wishes.update({PREF_MIN_ALIGNMENT[name]: ctypes.c_uint32(value) for name, value in alignments.items()})
    for attribute, value in wishes.items():
        _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value),
              ctypes.c_size_t(ctypes.sizeof(value)))
    best, found = _Heuristic(), ctypes.c_int(0)
    _call("cublasLtMatmulAlgoGetHeuristic", _handle(problem.device), description, first, second, result,
          result, preference, 1, ctypes.byref(best), ctypes.byref(found))
    _call("cublasLtMatmulPreferenceDestroy", preference)
    if not found.value or best.state:
        raise RuntimeError(f"cuBLASLt has no algorithm for {problem}")
    return best.algorithm


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
