"""Is what was written what was meant? By the bytes, and by what both models compute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from torch import Tensor

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.forward import Read, megatron_logits
from megatron.pretrain.export.hf import TensorSpec
from megatron.pretrain.export.hf_reader import HfFolder
from megatron.pretrain.export.shape import ModelShape

SAMPLE_TEXT = (
    "The old lighthouse keeper counted 1,024 steps, one for every night; "
    "灯塔下面的海很安静。 def f(x):\n    return 3 * x + 0.25\n")
TOLERANCE = 1e-4    # of the largest logit: fp32 sums in another order differ by less, a wrong weight by more

_BYTES_A_PARAMETER = 5    # fp32, and what lies around it


@dataclass(frozen=True)
class Verified:
    """What was compared. `logits_off` is the largest difference of two logits, None where `why_no_logits`."""

    tensors: int
    logits_off: float | None
    why_no_logits: str = ""

    def __str__(self) -> str:
        said = f"{self.tensors} tensors verified"
        if self.logits_off is None:
            return f"{said}, logits not compared: {self.why_no_logits}"
        return f"{said}, logits within {self.logits_off:.1e}"


def transformers() -> ModuleType:
    """The package, which only a verification needs. Raises UserError if it is not installed."""
    try:
        import transformers
        from transformers.utils import logging
    except ModuleNotFoundError as missing:
        raise UserError(f"--verify compares logits with those of transformers ({missing}): "
                        "pip install 'transformers>=5.0,<6', or leave --verify out") from None
    logging.disable_progress_bar()
    return transformers


def check_written(folder: Path, specs: Sequence[TensorSpec], meant: Iterable[tuple[str, Tensor]]) -> None:
    """Read each tensor back from the disk, by the safetensors library, and compare it bit by bit.

    Raises UserError naming the tensor that is missing, left over or not what was meant.
    """
    for path in folder.glob("*.safetensors"):
        _leave_cache(path)
    written = HfFolder(folder)
    differing = {spec.name for spec in specs} ^ set(written.names())
    if differing:
        raise UserError(f"verification failed: {min(differing)} is missing or left over")
    for name, tensor in meant:
        with safe_open(written.path(name), framework="pt") as file:
            if not same_bits(file.get_tensor(name), tensor):
                raise UserError(f"verification failed: {name}, read back from the disk, is not what was "
                                "written: is the disk sound?")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether type, shape and bits are the same; a nan is like any other."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    same = one.view(bits) == other.view(bits)
    return bool(same.all() or (same | one.isnan() & other.isnan()).all())


def compare_logits(folder: Path, read: Read, names: Sequence[str], shape: ModelShape,
                   dtype: ElementType, parameters: int) -> tuple[float | None, str]:
    """Largest difference of the logits of SAMPLE_TEXT, in fp32, of `folder` by transformers and of Megatron's
    tensors by their formulas, both rounded to `dtype`; or None and why they were not compared.

    Raises UserError where they differ by more than TOLERANCE.
    """
    needed_bytes, free_bytes = parameters * _BYTES_A_PARAMETER, _free_bytes()
    if needed_bytes > free_bytes:
        return None, f"{needed_bytes / 1e9:.0f} GB needed, {free_bytes / 1e9:.0f} GB free"
    ids = _sample_ids(folder, shape)
    expected = megatron_logits(lambda name: read(name).to(dtype.of_torch), names, shape, ids)
    got = _transformers_logits(folder, ids)
    off = (got - expected).abs().max().item() if got.shape == expected.shape else torch.inf
    # Written so that a nan is a failure too.
    if not off <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(f"verification failed: the converted model's logits differ by {off:.1e} from those "
                        "of the checkpoint")
    return off, ""


def _leave_cache(path: Path) -> None:
    """Bring the file to the disk, and let the next reader take it from there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _free_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


def _sample_ids(folder: Path, shape: ModelShape) -> Tensor:
    """Ids `[tokens]` of SAMPLE_TEXT by the folder's tokenizer; some of the vocabulary where it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return torch.arange(shape.vocab_size)[::max(1, shape.vocab_size // 48)]
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(SAMPLE_TEXT, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[:shape.max_position_embeddings]


@torch.no_grad()
def _transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    model, report = transformers().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    wrong = [str(name) for names in report.values() for name in names]
    if wrong:
        raise UserError(f"verification failed: transformers finds tensors missing or unknown: {wrong[0]}")
    return model.eval()(ids[None]).logits[0]
