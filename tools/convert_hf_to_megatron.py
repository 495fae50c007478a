"""Turn a Hugging Face folder into a checkpoint that training starts from, in any layout."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

try:
    from megatron.pretrain.data.flags import FlagParser
    from megatron.pretrain.data.progress import ByteProgress
    from megatron.pretrain.errors import UserError, entry
    from megatron.pretrain.export.elements import WEIGHT_TYPES
    from megatron.pretrain.export.to_megatron import ImportOptions, plan_import, run_import
    from megatron.pretrain.tokenizer import SENTENCEPIECE_TYPES
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

DESCRIPTION = """\
Turn a Hugging Face folder (config.json and .safetensors) into a checkpoint that training starts from, with
any tensor- and pipeline-parallel size. No GPU is needed, and little memory.

Llama, Mistral (without a sliding window) and, for Megatron-LM, Qwen3. The vocabulary is padded again; added
rows are the mean of the others."""

EXAMPLES = """\
examples:
  python tools/convert_hf_to_megatron.py --hf-dir my-model --save checkpoints/my-model
  LOAD_CHECKPOINT_PATH=checkpoints/my-model bash neo/scripts/pretrain_7b.sh
  continues a model of that shape; without the launcher, the flags are --load checkpoints/my-model --finetune

  python tools/convert_hf_to_megatron.py --hf-dir neo_7b --save checkpoints/neo_7b \\
      --tokenizer-model neo_7b/tokenizer.model --tokenizer-sentencepiece-legacy
  a model of the NEO fork, whose <EOD> comes after the pieces"""


def main(argv: Sequence[str]) -> None:
    flags = _parse(argv)
    started = time.monotonic()
    plan = plan_import(flags.hf_dir, ImportOptions(
        tokenizer_path=flags.tokenizer_model, tokenizer_type=flags.tokenizer_type,
        tokenizer_legacy=flags.tokenizer_sentencepiece_legacy,
        dtype=flags.dtype and WEIGHT_TYPES[flags.dtype], for_megatron_lm=flags.for_megatron_lm))
    shape, tokenizer = plan.shape, plan.tokenizer_config
    print(f"{plan.architecture.name}: {shape.num_layers} layers of {shape.hidden_size}, "
          f"{shape.vocab_size:,} rows of vocabulary, padded to {shape.padded_vocab_size:,}; "
          f"{plan.size_bytes / 1e9:.2f} GB")
    print(f"tokenizer: {tokenizer.tokenizer_model} ({tokenizer.tokenizer_type}"
          f"{', legacy' if tokenizer.tokenizer_sentencepiece_legacy else ''}, "
          f"{plan.tokenizer.vocab_size:,} ids)")
    if flags.dry_run:
        return
    with ByteProgress(f"{flags.hf_dir.name} -> {flags.save.name}", plan.size_bytes) as progress:
        folder = run_import(plan, flags.save, verify=flags.verify, on_bytes=progress.advance)
    said = "written and read back" if flags.verify else "written"
    print(f"{folder}: {said} in {time.monotonic() - started:.1f} s")
    if flags.for_megatron_lm:
        print("for Megatron-LM: --load this --ckpt-format torch_dist --finetune; with no run.json, this "
              "project's own trainer does not take it")
    else:
        print(f"start from it with --load {flags.save} --finetune")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = FlagParser(prog="convert_hf_to_megatron.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--hf-dir", type=Path, required=True, metavar="DIR", help="the Hugging Face folder")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR",
                        help="the folder of checkpoints to make; it must not exist")
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                        help="the tokenizer's file or folder (default: the one in --hf-dir)")
    parser.add_argument("--tokenizer-type", choices=(*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer"),
                        help="default: SentencePieceTokenizer for a .model file, else HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-sentencepiece-legacy", action="store_true",
                        help="the NEO fork's vocabulary: <CLS> <SEP> <EOD> <MASK> <PAD> after the pieces")
    parser.add_argument("--dtype", choices=tuple(WEIGHT_TYPES),
                        help="type of the weights (default: as they are)")
    parser.add_argument("--verify", action="store_true",
                        help="read each tensor back and compare it with the folder's, bit by bit")
    parser.add_argument("--for-megatron-lm", action="store_true",
                        help="write what Megatron-LM reads (its args) instead of this project's run.json; "
                             "also for models that only it trains")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    flags = parser.parse(argv)
    if flags.save.exists():
        raise UserError(f"--save {flags.save} exists: remove it, or name another folder")
    return flags


if __name__ == "__main__":
    entry(main)
