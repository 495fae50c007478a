"""README.md of a converted folder, the model card: what the model is, and from what it was made."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from megatron.pretrain.checkpoint.manifest import Manifest, package_versions
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.shape import ModelShape

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- pretrained
---

# {name}

A base language model: pre-trained, not tuned to follow instructions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## The model

{model}
## From what it was made

{origin}"""


def model_card(manifest: Manifest, shape: ModelShape, architecture: str, dtype: ElementType, parameters: int,
               name: str) -> str:
    """The card's text. `parameters` counts the numbers written; `name` is the folder's."""
    attention = f"{shape.num_attention_heads} heads of {shape.kv_channels}"
    if shape.num_query_groups != shape.num_attention_heads:
        attention += f", {shape.num_query_groups} for keys and values"
    model = {
        "architecture": f"`{architecture}`",
        "parameters": f"{parameters:,}",
        "layers": shape.num_layers,
        "hidden, feed-forward": f"{shape.hidden_size:,}, {shape.ffn_hidden_size:,}",
        "attention": attention,
        "vocabulary": f"{shape.vocab_size:,}",
        "context": f"{shape.max_position_embeddings:,} tokens",
        "rotary base": f"{shape.rotary_base:g}",
        "output layer": "shared with the embedding" if shape.tied_embeddings else "its own",
        "type of the weights": f"`{dtype.name}`",
    }
    origin = {
        "iteration": f"{manifest.iteration:,}",
        "tokens seen": f"{manifest.consumed_tokens:,}",
        "mixture (SHA-256)": _code(manifest.mixture_hash),
        "tokenizer (SHA-256)": _code(manifest.tokenizer["fingerprint"]),
        "trained with": _versions(manifest.versions),
        "converted with": _versions(package_versions()),
        "converter's git commit": _code(_git_commit()),
    }
    return _CARD.format(name=name, model=_table(model), origin=_table(origin))


def _table(rows: dict[str, object]) -> str:
    """Rows without a value are left out."""
    lines = [f"| {name} | {value} |\n" for name, value in rows.items() if value != ""]
    return "| | |\n|---|---|\n" + "".join(lines)


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")


@cache
def _git_commit() -> str | None:
    """The commit that this file is of, `-dirty` where files differ from it; None outside a git checkout."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True, timeout=30,
            cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
