"""cuBLASLt's products, called through ctypes for what torch does not offer.

An fp8 product adds to a matrix: `torch._scaled_mm` writes its result, and adding that to an accumulator afterwards
moves 10 bytes a weight more. And any product takes the fastest of the algorithms that cuBLASLt proposes: at NEO's
shapes on an H200 the one that torch takes was up to 19 % slower in fp8 and, but for the smallest, up to 8 % in bf16.
Numbers below are cublasLt.h's.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper
PROPOSALS = 8
COMPARED_ROWS = 256
"""Of two results, some of all of their tiles."""
TRIALS, CALLS = 2, 2
"""How often an algorithm is timed, and its calls each time."""
TELLING = 1 / 16
"""The share of numbers that are not zero, from which on equal bits say something."""
NOT_SUPPORTED = 15

CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
COMPUTE_32F = 68
OP_N, OP_T = 0, 1
DESC_TRANSA, DESC_TRANSB, DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER, DESC_FAST_ACCUM = 3, 4, 17, 18, 25
PREF_MAX_WORKSPACE_BYTES, PREF_MIN_ALIGNMENT = 1, {"a": 5, "b": 6, "c": 7, "d": 8}

_Pointer = ctypes.c_void_p

logger = logging.getLogger(__name__)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (("algorithm", _Algorithm), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4))


class _Operand(NamedTuple):
    """How a matrix lies in memory."""

    dtype: torch.dtype
    by_rows: bool
    """Rows are contiguous; otherwise columns are."""
    leading: int
    """From one row, or column, to the next, in numbers."""
    alignment: int
    """The largest power of two, up to 256, that divides the address in bytes."""


class _Problem(NamedTuple):
    """What cuBLASLt chooses an algorithm by: out [rows, columns] = left [rows, depth] @ right [depth, columns]."""

    device: torch.device
    rows: int
    columns: int
    depth: int
    left: _Operand
    right: _Operand
    added: _Operand
    out: _Operand
    scaled: bool
    fast_accumulation: bool
    has_plain: bool


@dataclass
class _Plan:
    """A problem's descriptors, kept for the life of the process, and its algorithms."""

    description: _Pointer
    first: _Pointer
    second: _Pointer
    result: _Pointer
    algorithms: list[_Algorithm]
    """In the order of cuBLASLt's guess."""
    chosen: int | None = None
    """0 is what does the work before the choice, 1 the first algorithm."""


def multiply(left: Tensor, right: Tensor, out: Tensor, *, added: Tensor | None = None,
             inverses: tuple[Tensor, Tensor] | None = None, fast_accumulation: bool = False,
             plain: Callable[[], None] | None = None) -> None:
    """out = added + left @ right, times the inverses of an fp8 product's scales, on the current stream.

    left [rows, depth] and right [depth, columns] have 16 or 8 bits; with 8 they are e4m3 or one of them e5m2, left
    lies by rows and right by columns, and inverses are fp32 scalars on the device. out and added, which may be the
    same, are [rows, columns] by rows, both fp32 or both 16-bit. Without `fast_accumulation` fp8 sums are promoted to
    fp32 as they grow. ValueError for other shapes and strides.

    The first product of a shape that does not add to its own output tries the algorithms there are, which takes up
    to 0.2 s (`_fastest`). `plain` does the same by other means: it sets the bits that an algorithm must give, and
    does the work until one was chosen. RuntimeError where there is none for the shapes.
    """
    target = out if added is None else added
    problem = _problem(left, right, target, out, scaled=inverses is not None, fast_accumulation=fast_accumulation,
                       has_plain=plain is not None)
    if problem is None and plain is not None:
        plain()
        return
    if problem is None:
        said = (f"{list(part.shape)} {part.dtype} {list(part.stride())}" for part in (out, target, left, right))
        raise ValueError("{} = {} + {} @ {}".format(*said))
    plan = _plan(problem)
    others = _runs(plan, left, right, target, out, inverses, share=0.0 if added is None else 1.0)
    if plain is None and not others:
        raise RuntimeError(f"cuBLASLt has no algorithm for {list(left.shape)} {left.dtype} @ {list(right.shape)} "
                           f"{right.dtype} in {out.dtype}")
    ways = [plain or others[0], *others]
    repeatable = added is None or added.data_ptr() != out.data_ptr()
    with torch.cuda.device(out.device):
        if plan.chosen is None and repeatable and not torch.cuda.is_current_stream_capturing():
            plan.chosen = _fastest(ways[0], others, out)
        ways[plan.chosen or 0]()


def _problem(left: Tensor, right: Tensor, added: Tensor, out: Tensor, *, scaled: bool, fast_accumulation: bool,
             has_plain: bool) -> _Problem | None:
    """None of matrices that do not fit each other, or do not lie as they must."""
    rows, columns, depth = *out.shape, left.size(1)
    operands = [_operand(part) for part in (left, right, added, out)]
    if None in operands or left.shape != (rows, depth) or right.shape != (depth, columns) or added.shape != out.shape:
        return None
    if not operands[3].by_rows or operands[2][:3] != operands[3][:3]:
        return None
    return _Problem(out.device, rows, columns, depth, *operands, scaled, fast_accumulation, has_plain)


def _runs(plan: _Plan, left: Tensor, right: Tensor, added: Tensor, out: Tensor,
          inverses: tuple[Tensor, Tensor] | None, share: float) -> list[Callable[[], None]]:
    """out = share x added + left @ right by each of the plan's algorithms."""
    if inverses is not None:
        # cuBLASLt's matrices are stored by columns: its result is out^T = right^T @ left^T, its first operand is right.
        for attribute, inverse in zip((DESC_B_SCALE_POINTER, DESC_A_SCALE_POINTER), inverses, strict=True):
            _set(plan.description, attribute, _Pointer(inverse.data_ptr()))
    stream = torch.cuda.current_stream(out.device).cuda_stream
    alpha, beta = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(share))

    def run(algorithm: _Algorithm) -> None:
        _call("cublasLtMatmul", _handle(out.device), plan.description, alpha, _Pointer(right.data_ptr()), plan.first,
              _Pointer(left.data_ptr()), plan.second, beta, _Pointer(added.data_ptr()), plan.result,
              _Pointer(out.data_ptr()), plan.result, ctypes.byref(algorithm),
              _Pointer(_workspace(out.device, stream).data_ptr()), ctypes.c_size_t(WORKSPACE_BYTES),
              _Pointer(stream))

    return [partial(run, algorithm) for algorithm in plan.algorithms]


def _fastest(first: Callable[[], None], others: Sequence[Callable[[], None]], out: Tensor) -> int | None:
    """Which of the others, counted from 1, takes the least time and has the first one's bits; 0 where none has.

    So the choice, which noise may decide, and which other ranks and runs may make in another way, is none of numbers:
    tiles differ, the order of a sum does not. Those that cut a sum are left out. The first is not in the race: where
    it is torch's, it may sum in yet another order what it adds to. None where these numbers cannot tell.
    """
    compared = out[::max(1, out.size(0) // COMPARED_ROWS)]
    first()
    if not (compared.isfinite().all() and compared.count_nonzero() >= TELLING * compared.numel()):
        return None
    expected = compared.clone()
    equal = [number for number, other in enumerate(others, start=1) if _gives(other, compared, expected)]
    spent_ms = [[_milliseconds(others[number - 1]) for number in equal] for _ in range(TRIALS)]
    least_ms = [min(trials) for trials in zip(*spent_ms, strict=True)]
    return equal[least_ms.index(min(least_ms))] if equal else 0


def _gives(product: Callable[[], None], result: Tensor, expected: Tensor) -> bool:
    try:
        product()
    except RuntimeError:    # what was proposed need not run
        return False
    return torch.equal(result.view(torch.int16), expected.view(torch.int16))


def _milliseconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()    # so that the launches that follow wait for nothing but the GPU
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _operand(matrix: Tensor) -> _Operand | None:
    """None where neither rows nor columns are contiguous."""
    (height, width), (down, across) = matrix.shape, matrix.stride()
    address = matrix.data_ptr()
    alignment = min(address & -address, 256)
    if across == 1 and down >= width:
        return _Operand(matrix.dtype, True, down, alignment)
    if down == 1 and across >= height:
        return _Operand(matrix.dtype, False, across, alignment)
    return None


@cache
def _plan(problem: _Problem) -> _Plan:
    description = _Pointer()
    _call("cublasLtMatmulDescCreate", ctypes.byref(description), COMPUTE_32F, CUDA_TYPES[torch.float32])
    for attribute, operand in ((DESC_TRANSA, problem.right), (DESC_TRANSB, problem.left)):
        # By rows is by columns of the transpose, which is what is multiplied: right^T @ left^T.
        _set(description, attribute, ctypes.c_int32(OP_N if operand.by_rows else OP_T))
    if problem.scaled:
        _set(description, DESC_FAST_ACCUM, ctypes.c_int8(problem.fast_accumulation))
        # The heuristic must know that there are scales; which ones is said with each product.
        scale = torch.ones((), device=problem.device)
        for attribute in (DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER):
            _set(description, attribute, _Pointer(scale.data_ptr()))
    first = _layout(problem.right, problem.depth, problem.columns)
    second = _layout(problem.left, problem.rows, problem.depth)
    result = _layout(problem.out, problem.rows, problem.columns)
    return _Plan(description, first, second, result, _proposals(problem, description, first, second, result))


def _proposals(problem: _Problem, description: _Pointer, first: _Pointer, second: _Pointer,
               result: _Pointer) -> list[_Algorithm]:
    """Algorithms, in the order of cuBLASLt's guess; none where it has none."""
    preference = _Pointer()
    _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    wishes = {PREF_MAX_WORKSPACE_BYTES: ctypes.c_uint64(WORKSPACE_BYTES)}
    alignments = {"a": problem.right.alignment, "b": problem.left.alignment, "c": problem.added.alignment,
                  "d": problem.out.alignment}
    wishes.update({PREF_MIN_ALIGNMENT[name]: ctypes.c_uint32(value) for name, value in alignments.items()})
    for attribute, value in wishes.items():
        _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.byref(value),
              ctypes.c_size_t(ctypes.sizeof(value)))
    guesses, found = (_Heuristic * PROPOSALS)(), ctypes.c_int(0)
    status = _status("cublasLtMatmulAlgoGetHeuristic", _handle(problem.device), description, first, second, result,
                     result, preference, PROPOSALS, guesses, ctypes.byref(found))
    _call("cublasLtMatmulPreferenceDestroy", preference)
    if status == NOT_SUPPORTED:
        return []
    _check("cublasLtMatmulAlgoGetHeuristic", status)
    return [guess.algorithm for guess in guesses[:found.value] if not guess.state]


def _layout(operand: _Operand, height: int, width: int) -> _Pointer:
    """Of a matrix [height, width]: as it is where it lies by columns, and of its transpose where it lies by rows."""
    layout = _Pointer()
    stored = (width, height) if operand.by_rows else (height, width)
    _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), CUDA_TYPES[operand.dtype],
          *(ctypes.c_uint64(size) for size in stored), ctypes.c_int64(operand.leading))
    return layout


def _set(description: _Pointer, attribute: int, value: ctypes._SimpleCData) -> None:
    _call("cublasLtMatmulDescSetAttribute", description, attribute, ctypes.byref(value),
          ctypes.c_size_t(ctypes.sizeof(value)))


@cache
def _handle(device: torch.device) -> _Pointer:
    handle = _Pointer()
    with torch.cuda.device(device):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


@cache
def _workspace(device: torch.device, stream: int) -> Tensor:
    """A stream's own: products of one stream follow each other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@cache
def is_there() -> bool:
    """Whether this torch is NVIDIA's and has loaded the library; a word in the log where it is and has not."""
    if torch.version.cuda is None:
        return False
    try:
        _library()
    except OSError as error:
        logger.warning("torch alone multiplies: %s", error)
        return False
    return True


@cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded: its name without a path finds it."""
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _call(function: str, *arguments: object) -> None:
    _check(function, _status(function, *arguments))


def _check(function: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{function} failed with status {status}")


def _status(function: str, *arguments: object) -> int:
    return getattr(_library(), function)(*arguments)
