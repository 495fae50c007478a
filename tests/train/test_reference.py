"""The same 20 steps in plain transformers and torch: we train the model we say we train.

The loss is normalised as documented: over each micro-batch's unmasked tokens, then over micro-batches.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.dataset import open_dataset
from megatron.pretrain.data.blend import parse_blend
from megatron.pretrain.tokenizer import build_tokenizer

STEPS, GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, SEED, TOLERANCE = 20, 8, 2, 64, 1234, 1e-5
# The softmax of training runs over padded rows too, which the exported model does not have: let there be none.
NO_PADDING = ("--make-vocab-size-divisible-by", 8)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return train(folder, "--train-iters", STEPS, "--exit-interval", 1, *NO_PADDING).checkpoints


def learning_rate(step: int) -> float:
    """Warm-up over 2 of 20 iterations from 0 to 3e-3, then a cosine to 3e-4."""
    if step <= 2:
        return 3e-3 * step / 2
    return 3e-4 + 0.5 * (3e-3 - 3e-4) * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))


def reference_losses(model: LlamaForCausalLM, samples) -> list[float]:
    """Train `model` on `samples(step)`: int64 [8, 65] tokens and float32 [8, 64] loss mask."""
    norms = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        tokens, mask = (torch.from_numpy(part) for part in samples(step))
        micro_losses = []
        for rows in torch.arange(GLOBAL_BATCH).split(MICRO_BATCH):
            logits = model(tokens[rows, :-1]).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[rows, 1:].flatten(), reduction="none")
            weights = mask[rows].flatten()
            micro_losses.append((each * weights).sum() / weights.sum())
        loss = torch.stack(micro_losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_equal_those_of_transformers(tmp_path: Path, train, run_tool, start: Path, tiny_dataset: Path,
                                            tiny_tokenizer: Path) -> None:
    ours = train(tmp_path / "ours", "--train-iters", STEPS, "--load", start, "--finetune", *NO_PADDING).losses()
    said = run_tool("neo/scripts/batch_convert_ckpt.py", "--megatron-dir", start / "iter_0000001", "--hf-dir",
                    tmp_path / "hf", "--tokenizer-dir", tiny_tokenizer)
    assert said.returncode == 0, said.stderr
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="sdpa")

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(tiny_tokenizer)))
    dataset = open_dataset(parse_blend([str(tiny_dataset)]), tokenizer=tokenizer, seq_length=SEQ_LENGTH,
                           seed=SEED, eod_mask_loss=True)
    theirs = reference_losses(
        model, lambda step: dataset.samples(np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)))

    assert len(ours) == STEPS
    assert ours[-1] < ours[0] - 0.5, "it must learn, or equal losses would say little"
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
