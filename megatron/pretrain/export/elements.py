"""The types of a tensor's elements by name, and from one to another by numpy: torch takes seconds to load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron.pretrain.errors import UserError

if TYPE_CHECKING:
    import torch

Elements = memoryview | np.ndarray
"""Elements as bytes, or as an array of a type that holds them."""


@dataclass(frozen=True)
class ElementType:
    """A type of elements; `name` is torch's."""

    name: str
    size_bytes: int

    @property
    def of_torch(self) -> torch.dtype:
        """The same as torch has it."""
        import torch

        return getattr(torch, self.name)


ELEMENT_TYPES = {name: ElementType(name, size_bytes) for size_bytes, names in {
    1: ("bool", "uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    2: ("bfloat16", "float16", "int16", "uint16"),
    4: ("float32", "int32", "uint32", "complex32"),
    8: ("float64", "int64", "uint64", "complex64"),
    16: ("complex128",)}.items() for name in names}
BF16, FP16, FP32 = (ELEMENT_TYPES[name] for name in ("bfloat16", "float16", "float32"))
WEIGHT_TYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
"""What a model's weights may be, by the names that flags give them."""

_LARGEST_FP16 = 65504.0


def convert(elements: memoryview, source: ElementType, target: ElementType, name: str) -> Elements:
    """`elements` of type `source` as type `target`, both of WEIGHT_TYPES; rounded to nearest, ties to even.

    Raises UserError, which calls the tensor `name`, where a number would become infinite in fp16.
    """
    if source == target:
        return elements
    numbers = widened(elements, source)
    if target == FP16:
        largest = np.max(np.abs(numbers), initial=0.0, where=np.isfinite(numbers))
        if largest > _LARGEST_FP16:
            raise UserError(f"{name} holds {largest:g}, and fp16 ends at {_LARGEST_FP16:g}: take bf16 or "
                            "fp32 (--dtype)")
    return narrowed(numbers, target)


def widened(elements: memoryview, source: ElementType) -> np.ndarray:
    """Elements of one of WEIGHT_TYPES as fp32."""
    if source == BF16:
        return (np.frombuffer(elements, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(elements, source.name).astype(np.float32, copy=False)


def narrowed(numbers: np.ndarray, target: ElementType) -> np.ndarray:
    """fp32 as one of WEIGHT_TYPES; bf16, which numpy does not know, as its bits in uint16."""
    if target != BF16:
        return numbers.astype(target.name, copy=False)
    bits = numbers.view(np.uint32)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1) >> 16).astype(np.uint16)
    upper[np.isnan(numbers)] = 0x7FC0    # rounding up could carry a nan over to zero
    return upper
