"""Convert a run's checkpoints to Hugging Face folders; `--help` says how."""

from __future__ import annotations

import sys

try:
    from megatron.pretrain.errors import entry
    from megatron.pretrain.export.batch import main
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    entry(main)
