"""Tokenize JSON lines into the .bin/.idx files that training reads."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence

# A short run is mostly its own start: no search for garbage where nothing but modules is made, and no
# threads of numpy's linear algebra, which is not used here.
gc.disable()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    from megatron.pretrain.data.flags import FlagParser, positive_number
    from megatron.pretrain.data.preprocess import PreprocessConfig, Summary, preprocess
    from megatron.pretrain.data.shard import Shard, parse_shard
    from megatron.pretrain.errors import entry
    from megatron.pretrain.tokenizer import TOKENIZER_TYPES
    from megatron.pretrain.tokenizer_config import TokenizerConfig
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

NO_SENTENCES = "a document is one sequence and is never cut into sentences; leave it out"
NO_SEARCH = "give --workers; the work is shared evenly over all of them, so there is nothing to search for"
AS_IT_IS = "SentencePiece models and tokenizer.json are read as they are; give --tokenizer-model alone"
REFUSED = {
    "--partitions": "give --workers; the work is shared over all of them, whatever the files",
    "--split-sentences": NO_SENTENCES,
    "--keep-newlines": NO_SENTENCES,
    "--lang": NO_SENTENCES,
    "--find-optimal-num-workers": NO_SEARCH,
    "--workers-to-check": NO_SEARCH,
    "--max-documents": NO_SEARCH,
    "--performance-dir": NO_SEARCH,
    "--log-interval": "progress is shown by the bytes read; leave it out",
    "--dataset-impl": "the files are memory-mapped .bin/.idx; leave it out",
    **dict.fromkeys(("--vocab-file", "--merge-file", "--vocab-extra-ids", "--tokenizer-metadata",
                     "--tokenizer-special-tokens", "--tokenizer-hf-no-use-fast",
                     "--tokenizer-hf-no-include-special-tokens", "--trust-remote-code", "--tiktoken-pattern",
                     "--tiktoken-num-special-tokens"), AS_IT_IS),
}

DESCRIPTION = """\
Tokenize JSON lines into the .bin/.idx files that training reads.

Each line of --input is one document: a JSON object with a string under --json-keys. For every
key K the documents become PREFIX_K_document.bin (tokens), .idx (index) and .json (how it was
made), in the order of the input, with the same bytes for any number of workers. A bad line
stops the run with its number, and nothing is written; with --on-error skip it goes to
PREFIX_rejects.jsonl. A run that was stopped goes on with --resume."""

EXAMPLES = """\
examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus \\
      --tokenizer-model neo/tokenizer.model --append-eod
  writes corpus_text_document.bin, .idx and .json

  python tools/preprocess_data.py --input part-*.jsonl --json-keys title body --output-prefix wiki \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model my-tokenizer/ --append-eod
  writes wiki_title_document.* and wiki_body_document.*

  zcat dump.gz | python tools/preprocess_data.py --input - --output-prefix dump ...
  python tools/preprocess_data.py --input crawl/ 'more/**/*.jsonl.zst' --on-error skip ...
  reads standard input, or all JSON lines under a folder and of a glob

  python tools/preprocess_data.py --shard 3/16 --resume ... ; python tools/merge_datasets.py \\
      --output-prefix corpus
  does the third of 16 parts; when all are done, joins them (neo/scripts/preprocess.sbatch)"""


def main(argv: Sequence[str]) -> None:
    gc.freeze()
    gc.enable()
    _stop_on_signals()
    _print_summary(preprocess(_parse(argv)))


def _parse(argv: Sequence[str]) -> PreprocessConfig:
    parser = FlagParser(
        prog="preprocess_data.py", description=DESCRIPTION, epilog=EXAMPLES, refused=REFUSED)
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="FILE",
                        help="JSON lines, in this order: files (.gz and .zst are unpacked), globs, folders "
                        "(.jsonl, .json, .ndjson in and under them), or - for standard input")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="path and beginning of the name of the files to write; old ones are replaced")
    parser.add_argument("--json-keys", "--json-key", nargs="+", action="extend", metavar="KEY",
                        help="the text's field; several make one dataset each (default: text)")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="SentencePieceTokenizer",
                        metavar="TYPE", help=f"{', '.join(TOKENIZER_TYPES)} (default: the first)")
    parser.add_argument("--tokenizer-model", metavar="PATH",
                        help="SentencePiece model, or tokenizer.json or the folder that holds it")
    parser.add_argument("--tokenizer-sentencepiece-legacy", action="store_true",
                        help="ids of the NEO fork: <CLS> <SEP> <EOD> <MASK> <PAD> follow the model's pieces, "
                        "and a document ends with <EOD> instead of </s>")
    parser.add_argument("--vocab-size", type=positive_number, metavar="N", help="ids of a NullTokenizer")
    parser.add_argument("--append-eod", action="store_true",
                        help="end each document with the end-of-document id; training wants it")
    parser.add_argument("--workers", type=positive_number, default=_cores(), metavar="N",
                        help="processes to share the work over (default: the cores there are, %(default)s)")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail",
                        help="a line that is no document ends the run, or goes to PREFIX_rejects.jsonl with "
                        "its place and the reason (default: fail)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from where an interrupted run stopped (from the beginning where there "
                        "was none); without it, what that run left is removed")
    parser.add_argument("--shard", type=parse_shard, default=Shard(), metavar="I/N",
                        help="do the I-th of N parts of the input, from 1, to PREFIX_0000I-of-0000N; "
                        "tools/merge_datasets.py joins them")
    parser.add_argument("--encoder", choices=("auto", "library"), default="auto",
                        help="auto: the native encoder where it was built and covers the model; library: the "
                        "tokenizer's own, slower, with the same ids (default: %(default)s)")
    parser.add_argument("--keep-sequential-samples", action="store_true",
                        help="keep the order of the input, which is always kept; the original asks for it")
    flags = parser.parse(argv)
    tokenizer = TokenizerConfig(
        tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model,
        tokenizer_sentencepiece_legacy=flags.tokenizer_sentencepiece_legacy, vocab_size=flags.vocab_size)
    return PreprocessConfig(
        inputs=tuple(flags.input), output_prefix=flags.output_prefix, tokenizer=tokenizer,
        json_keys=tuple(dict.fromkeys(flags.json_keys or ("text",))), append_eod=flags.append_eod,
        workers=flags.workers, skip_bad_lines=flags.on_error == "skip", shard=flags.shard,
        resume=flags.resume, native_encoder=flags.encoder == "auto")


def _cores() -> int:
    """The cores this process may run on; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stop_on_signals() -> None:
    """Turn the signals that end a run into exceptions, so that no temporary file stays behind."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> None:
        for each in ending:  # a second one would cut the cleaning short
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in ending:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and `&` of a script stay in force
            signal.signal(number, stop)


def _print_summary(summary: Summary) -> None:
    title = f"{summary.input_bytes:,} bytes in, {summary.seconds:.1f} s"
    if not summary.resumed:  # what was done before would count as speed
        title += f", {summary.input_bytes / 1e6 / summary.seconds:.1f} MB/s"
    print(title)
    rows = [("dataset", "documents", "tokens", "text bytes", "bytes/token")]
    for dataset in summary.datasets:
        bytes_per_token = f"{dataset.text_bytes / dataset.tokens:.3f}" if dataset.tokens else "-"
        rows.append((os.path.basename(dataset.prefix), f"{dataset.documents:,}", f"{dataset.tokens:,}",
                     f"{dataset.text_bytes:,}", bytes_per_token))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *numbers in rows:
        cells = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:]))
        print(f"  {name:<{widths[0]}}  {'  '.join(cells)}")
    for kind, count in sorted(summary.rejected.items()):
        print(f"left out: {count:,} lines, {kind}")
    if summary.rejected:
        print(f"they are in {summary.rejects_path}")
    for dataset in summary.datasets:
        print(f"wrote {dataset.prefix}.bin, .idx and .json")


if __name__ == "__main__":
    entry(main)
