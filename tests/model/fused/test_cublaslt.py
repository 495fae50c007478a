"""What cuBLASLt is asked for, read as its documentation says: matrices by columns, D = alpha op(A) op(B) + beta C.

The library itself needs a GPU: `pytest -m gpu tests/model/fused` compares its products with torch's and float64's.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron.pretrain.model.fused import cublaslt

TYPES = {number: dtype for dtype, number in cublaslt.CUDA_TYPES.items()}
BF16 = torch.bfloat16


class Documented:
    """The calls that a product makes, as functions of what lies at the addresses they are given."""

    def __init__(self) -> None:
        self._objects: dict[int, dict] = {}
        self._numbers = itertools.count(1)
        self.algorithms: list[int] = []
        """The algorithm of each product, by its place among the proposals."""
        self.proposed = 3

    def __call__(self, function: str, *arguments: object) -> int:
        return getattr(self, function)(*arguments) or 0

    def cublasLtCreate(self, handle: object) -> None:
        self._create(handle)

    def cublasLtMatmulDescCreate(self, description: object, compute: int, scale: int) -> None:
        assert (compute, scale) == (68, 0)
        self._create(description, attributes={})

    def cublasLtMatmulDescSetAttribute(self, description: ctypes.c_void_p, attribute: int, value: object,
                                       size: ctypes.c_size_t) -> None:
        assert size.value == ctypes.sizeof(value._obj)
        self._of(description)["attributes"][attribute] = value._obj.value

    def cublasLtMatrixLayoutCreate(self, layout: object, kind: int, rows: ctypes.c_uint64, columns: ctypes.c_uint64,
                                   leading: ctypes.c_int64) -> None:
        assert leading.value >= rows.value
        self._create(layout, dtype=TYPES[kind], shape=(rows.value, columns.value), leading=leading.value)

    def cublasLtMatmulPreferenceCreate(self, preference: object) -> None:
        self._create(preference)

    def cublasLtMatmulPreferenceSetAttribute(self, *_: object) -> None: ...

    def cublasLtMatmulPreferenceDestroy(self, preference: object) -> None: ...

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: object) -> int:
        *_, wanted, guesses, found = arguments
        if not self.proposed:
            return 15  # not supported
        found._obj.value = min(self.proposed, wanted)
        for number in range(found._obj.value):
            guesses[number].algorithm.data[0] = number
        return 0

    def cublasLtMatmul(self, handle: object, description: ctypes.c_void_p, alpha: object, a: ctypes.c_void_p,
                       a_layout: ctypes.c_void_p, b: ctypes.c_void_p, b_layout: ctypes.c_void_p, beta: object,
                       c: ctypes.c_void_p, c_layout: ctypes.c_void_p, d: ctypes.c_void_p, d_layout: ctypes.c_void_p,
                       algorithm: object, *_: object) -> None:
        attributes = self._of(description)["attributes"]
        left = self._matrix(a, a_layout).double()
        right = self._matrix(b, b_layout).double()
        left = left.T if attributes.get(3) else left
        right = right.T if attributes.get(4) else right
        scale = alpha._obj.value
        for pointer in (attributes[number] for number in (17, 18) if number in attributes):
            scale *= ctypes.c_float.from_address(pointer).value
        total = scale * (left @ right)
        if beta._obj.value:
            total += beta._obj.value * self._matrix(c, c_layout).double()
        self._matrix(d, d_layout).copy_(total)
        self.algorithms.append(algorithm._obj.data[0])

    def _create(self, pointer: object, **content: object) -> None:
        pointer._obj.value = next(self._numbers)
        self._objects[pointer._obj.value] = content

    def _of(self, pointer: ctypes.c_void_p) -> dict:
        return self._objects[pointer.value]

    def _matrix(self, address: ctypes.c_void_p, layout: ctypes.c_void_p) -> Tensor:
        kind = self._of(layout)
        (rows, columns), leading = kind["shape"], kind["leading"]
        count = leading * (columns - 1) + rows
        memory = (ctypes.c_char * (count * kind["dtype"].itemsize)).from_address(address.value)
        return torch.frombuffer(memory, dtype=kind["dtype"]).as_strided((rows, columns), (1, leading))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Documented:
    """In cuBLASLt's place, with tensors of a CPU in those of a GPU."""
    for cached in (cublaslt._plan, cublaslt._handle, cublaslt._workspace):
        cached.cache_clear()
    documented = Documented()
    monkeypatch.setattr(cublaslt, "_status", documented)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cublaslt, "_milliseconds", lambda call: next(documented.milliseconds))
    documented.milliseconds = itertools.repeat(1.0)
    yield documented
    for cached in (cublaslt._plan, cublaslt._handle, cublaslt._workspace):
        cached.cache_clear()


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose products and sums are exact in any order and precision."""
    return torch.randint(-3, 4, shape).to(BF16)


def by_columns(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous().T


def beside_torch(left: Tensor, right: Tensor, out: Tensor, added: Tensor | None = None) -> None:
    """A product that torch has too."""
    def plain() -> None:
        out.copy_(left.float() @ right.float() + (0 if added is None else added))

    cublaslt.multiply(left, right, out, added=added, plain=plain)


ROWS, COLUMNS, DEPTH = 5, 3, 7
LAYOUTS = [(first, second) for first in (torch.Tensor.contiguous, by_columns)
           for second in (torch.Tensor.contiguous, by_columns)]


@pytest.mark.parametrize("left_lies, right_lies", LAYOUTS)
def test_plain_and_accumulated_products(library: Documented, left_lies, right_lies) -> None:
    left, right = left_lies(whole(ROWS, DEPTH)), right_lies(whole(DEPTH, COLUMNS))
    exact = left.float() @ right.float()
    for kind in (BF16, torch.float32):
        start = torch.ones(ROWS, COLUMNS, dtype=kind)
        out = torch.full_like(start, torch.nan)
        cublaslt.multiply(left, right, out)
        assert torch.equal(out.float(), exact)
        cublaslt.multiply(left, right, out, added=start)
        assert torch.equal(out.float(), exact + 1) and torch.equal(start, torch.ones_like(start))
        cublaslt.multiply(left, right, out, added=out)
        assert torch.equal(out.float(), 2 * exact + 1)


def test_parts_of_larger_matrices(library: Documented) -> None:
    left, right = whole(ROWS + 2, DEPTH + 4)[1:-1, 2:-2], whole(DEPTH, COLUMNS + 6)[:, 3:-3]
    out = torch.zeros(ROWS, COLUMNS + 2)
    cublaslt.multiply(left, right, out[:, 1:-1])
    assert torch.equal(out[:, 1:-1], left.float() @ right.float()) and not out[:, [0, -1]].any()
    cublaslt.multiply(whole(1, DEPTH).T[:1], whole(1, COLUMNS), out[:1, :COLUMNS])  # every stride is 1 or nobody's


def test_scales_of_fp8(library: Documented) -> None:
    left, right = whole(ROWS, DEPTH).to(torch.float8_e5m2), whole(COLUMNS, DEPTH).to(torch.float8_e4m3fn)
    out = torch.empty(ROWS, COLUMNS, dtype=BF16)
    cublaslt.multiply(left, right.T, out, inverses=(torch.tensor(0.5), torch.tensor(4.0)))
    assert torch.equal(out.float(), 2 * left.float() @ right.float().T)


def test_the_fastest_with_the_same_bits_is_taken_once(library: Documented) -> None:
    left, right, out = whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.empty(ROWS, COLUMNS)
    library.milliseconds = itertools.cycle([9.0, 2.0, 3.0])
    for _ in range(2):
        beside_torch(left, right, out)
    assert library.algorithms == [0, 1, 2, 1, 1]
    beside_torch(left, right, out, added=out)
    assert library.algorithms[-1] == 1 and torch.equal(out, 2 * (left.float() @ right.float()))


@pytest.mark.parametrize("number", [0.0, torch.nan, torch.inf])
def test_numbers_that_cannot_tell_choose_nothing(library: Documented, number: float) -> None:
    left, right, out = whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.empty(ROWS, COLUMNS)
    library.milliseconds = itertools.cycle([9.0, 2.0, 3.0])
    for _ in range(2):
        beside_torch(torch.full_like(left, number), right, out)
    assert library.algorithms == []
    beside_torch(left, right, out)
    assert library.algorithms == [0, 1, 2, 1]


def test_other_bits_are_never_taken(library: Documented) -> None:
    left, right, out = whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.empty(ROWS, COLUMNS)

    def plain() -> None:
        torch.mul(left.float() @ right.float(), 1 + 2**-20, out=out)

    for _ in range(2):
        cublaslt.multiply(left, right, out, plain=plain)
        assert torch.equal(out, (left.float() @ right.float()) * (1 + 2**-20))
    assert library.algorithms == [0, 1, 2]    # tried once, and never again


def test_an_algorithm_that_does_not_run_is_left_out(library: Documented, monkeypatch) -> None:
    def but_the_fastest(function: str, *arguments: object) -> int:
        if function == "cublasLtMatmul" and arguments[12]._obj.data[0] == 1:
            return 15
        return library(function, *arguments)

    monkeypatch.setattr(cublaslt, "_status", but_the_fastest)
    left, right, out = whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.empty(ROWS, COLUMNS)
    library.milliseconds = itertools.cycle([9.0, 3.0])    # of the first and of the third
    beside_torch(left, right, out)
    assert library.algorithms == [0, 2, 2]


def test_fp8_has_no_other_way(library: Documented) -> None:
    left, right = whole(ROWS, DEPTH).to(torch.float8_e4m3fn), whole(COLUMNS, DEPTH).to(torch.float8_e4m3fn).T
    out, one = torch.zeros(ROWS, COLUMNS), torch.ones(())
    cublaslt.multiply(left, right, out, added=out, inverses=(one, one))
    assert library.algorithms == [0], "what it adds to cannot be tried"
    library.milliseconds = itertools.cycle([9.0, 8.0, 1.0])
    cublaslt.multiply(left, right, out, inverses=(one, one))
    assert library.algorithms == [0, 0, 0, 1, 2, 2]
    assert torch.equal(out, left.float() @ right.float())


def test_what_cannot_be_repeated_or_recorded_takes_the_first(library: Documented, monkeypatch) -> None:
    left, right, out = whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.zeros(ROWS, COLUMNS)
    beside_torch(left, right, out, added=out)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    beside_torch(left, right, out)
    assert library.algorithms == [] and torch.equal(out, left.float() @ right.float())


def test_shapes_that_do_not_fit_and_products_that_nobody_has(library: Documented) -> None:
    out = torch.empty(ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r"\[5, 3\] torch.float32 \[3, 1\] = .* \[5, 7\] .* @ \[6, 3\]"):
        cublaslt.multiply(whole(ROWS, DEPTH), whole(DEPTH - 1, COLUMNS), out)
    for added, into in ((torch.empty(ROWS, COLUMNS + 1)[:, 1:], out), (by_columns(out), by_columns(out))):
        with pytest.raises(ValueError, match=" @ "):
            cublaslt.multiply(whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), into, added=added)
    scattered = whole(ROWS, 2 * DEPTH)[:, ::2]
    with pytest.raises(ValueError, match="14, 2"):
        cublaslt.multiply(scattered, whole(DEPTH, COLUMNS), out)
    right = whole(DEPTH, COLUMNS)
    beside_torch(scattered, right, out)
    assert torch.equal(out, scattered.float() @ right.float())
    library.proposed = 0
    with pytest.raises(RuntimeError, match="no algorithm for"):
        cublaslt.multiply(whole(ROWS, DEPTH), right, out)
    narrow = whole(ROWS, DEPTH)
    beside_torch(narrow, right, out)
    assert torch.equal(out, narrow.float() @ right.float())


def test_an_error_is_not_a_shape_that_nobody_has(library: Documented, monkeypatch) -> None:
    monkeypatch.setattr(cublaslt, "_status", lambda function, *arguments: 3 if function.endswith("Heuristic")
                        else library(function, *arguments))
    with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic failed with status 3"):
        beside_torch(whole(ROWS, DEPTH), whole(DEPTH, COLUMNS), torch.empty(ROWS, COLUMNS))
