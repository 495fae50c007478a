"""JSON lines to token sets: PREFIX_KEY_document for each key, the same bytes for any number of workers.

Memory stays bounded whatever the input, below 200 MB a worker: it holds a few chunks of 2 MB and what it
makes of them, and writes that itself where the parent tells it to. Nothing grows with the number of
documents. A line that is longer than a chunk is one, and takes about ten times its length.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.pretrain import __version__
from megatron.pretrain.data.encoders import choose_encoder
from megatron.pretrain.data.inputs import Input, open_inputs
from megatron.pretrain.data.output import RunOutput, set_prefixes
from megatron.pretrain.data.parts import PlacedWriter, token_format
from megatron.pretrain.data.progress import ByteProgress
from megatron.pretrain.data.shard import Shard, Span, cut_into_spans, cut_into_tasks
from megatron.pretrain.data.tasks import ChunkWork
from megatron.pretrain.data.workers import OrderedWorkers
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer
from megatron.pretrain.tokenizer_config import TokenizerConfig

CHUNK_BYTES = 2 << 20
"""Enough to hide the cost of handing a chunk over, little enough to keep every worker busy to the end."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to tokenize, how, and where to.

    skip_bad_lines: leave them out and list them in PREFIX_rejects.jsonl; otherwise the first ends the run.
    shard: the part of the inputs to do; one of several has its number in the names of its files.
    resume: go on from where an interrupted run of the same settings stopped.
    native_encoder: use the one in C++ where it was built and covers the model.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    skip_bad_lines: bool = False
    shard: Shard = Shard()
    resume: bool = False
    chunk_bytes: int = CHUNK_BYTES
    native_encoder: bool = True

    @property
    def prefix(self) -> str:
        """Of the files that this run writes."""
        return self.shard.prefix(self.output_prefix)


@dataclass(frozen=True)
class DatasetSummary:
    """What became of one key."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    """The texts alone, in UTF-8."""


@dataclass(frozen=True)
class Summary:
    """What a run read and wrote. A resumed one counts what was done before, but not its time."""

    datasets: tuple[DatasetSummary, ...]
    input_bytes: int
    seconds: float
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Lines that were left out, by what is wrong with them."""
    rejects_path: str | None = None
    resumed: bool = False


def preprocess(config: PreprocessConfig) -> Summary:
    """Write one token set a key, in the order of the input; all of them, or none where anything is wrong.

    An interruption (Ctrl-C, a signal, the loss of a worker or of the power) leaves hidden parts that a run
    with `resume` goes on from, to the same bytes.

    Raises UserError for whatever the user can mend: a bad line, a missing file, a tokenizer that is none,
    an output that cannot be written, a worker that was killed.
    """
    started = time.monotonic()
    inputs = open_inputs(config.inputs)
    _check_resume(config, inputs)
    tokenizer = build_tokenizer(config.tokenizer)
    spans = cut_into_spans(inputs, config.shard)
    _check_outputs(config, inputs)
    encoder, which = choose_encoder(tokenizer, config.json_keys, config.append_eod,
                                    native=config.native_encoder)
    print(which, flush=True)
    total_bytes = sum(span.size_bytes for span in spans)
    chunks = -(-total_bytes // config.chunk_bytes)
    is_known = not any(span.input.is_stream for span in spans)
    count = max(1, min(config.workers, chunks)) if is_known else config.workers
    writers = [PlacedWriter(prefix, token_format(tokenizer.vocab_size))
               for prefix in set_prefixes(config.prefix, config.json_keys)]
    # The workers start first: what is open or runs in the parent when it forks lives on in them.
    with (OrderedWorkers(count, ChunkWork(encoder, config.json_keys, writers)) as workers,
          _open_output(config, tokenizer, inputs, spans) as output,
          ByteProgress("preprocessing", total_bytes) as progress):
        at = output.resumed_at
        progress.advance(_bytes_before(spans, at.span, at.byte))
        tasks = cut_into_tasks(spans, config.chunk_bytes, at.span, at.byte)
        for task in workers.run(tasks, output.place):
            output.written()
            progress.advance(task.disk_bytes)
        _check_documents(config, output)
        output.finish([_manifest(config, tokenizer, inputs, key, output, number)
                       for number, key in enumerate(config.json_keys)])
    position = output.position
    datasets = tuple(DatasetSummary(writer.prefix, at.documents, at.tokens, size_bytes)
                     for writer, at, size_bytes in zip(output.writers, position.sets, position.text_bytes))
    return Summary(datasets, total_bytes or sum(position.text_bytes), time.monotonic() - started,
                   position.rejected, output.rejects_path, at.byte > 0)


def _open_output(config: PreprocessConfig, tokenizer: Tokenizer, inputs: Sequence[Input],
                 spans: Sequence[Span]) -> RunOutput:
    settings = {
        "inputs": [asdict(source) for source in inputs], "shard": str(config.shard),
        "tokenizer": tokenizer.fingerprint, "eod_id": tokenizer.eod_id, "json_keys": config.json_keys,
        "append_eod": config.append_eod, "on_error": "skip" if config.skip_bad_lines else "fail",
        "tool_version": __version__}
    return RunOutput(config.prefix, spans, config.json_keys, token_format(tokenizer.vocab_size), settings,
                     skip=config.skip_bad_lines, resume=config.resume,
                     resumable=not any(source.is_standard_input for source in inputs))


def _bytes_before(spans: Sequence[Span], number: int, byte: int) -> int:
    """On the disk, as near as it is known: where in a compressed file a byte of its text is, is not."""
    done_bytes = sum(span.size_bytes for span in spans[:number])
    if byte and not spans[number].input.is_stream:
        done_bytes += byte - spans[number].start_byte
    return done_bytes


def _check_resume(config: PreprocessConfig, inputs: Sequence[Input]) -> None:
    if config.resume and any(source.is_standard_input for source in inputs):
        raise UserError("--resume: standard input cannot be read a second time; give files, or leave it out")


def _check_outputs(config: PreprocessConfig, inputs: Sequence[Input]) -> None:
    flag = f"--output-prefix {config.output_prefix}"
    folder = Path(config.output_prefix).parent
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is no folder; make it first")
    paths = {os.path.realpath(source.path) for source in inputs}
    outputs = [f"{config.prefix}_{key}_document{ending}"
               for key in config.json_keys for ending in (".bin", ".idx", ".json")]
    for output in (*outputs, f"{config.prefix}_rejects.jsonl"):
        if os.path.realpath(output) in paths:
            raise UserError(f"{flag}: {output} is also an input and would be overwritten; "
                            "choose another prefix")
        if os.path.isdir(output):
            raise UserError(f"{flag}: {output} is a folder; choose another prefix")


def _check_documents(config: PreprocessConfig, output: RunOutput) -> None:
    """One of several shards may be empty: lines can be longer than a share of the input."""
    if output.position.sets[0].documents or config.shard.count > 1:
        return
    rejected = "; ".join(f"{count:,} lines: {kind}" for kind, count in output.position.rejected.items())
    raise UserError(f"--input {' '.join(config.inputs)}: holds no document"
                    + (f" ({rejected}); --on-error fail names the first" if rejected else ""))


def _manifest(config: PreprocessConfig, tokenizer: Tokenizer, inputs: Sequence[Input], key: str,
              output: RunOutput, number: int) -> dict[str, Any]:
    position = output.position
    return {
        "tool_version": __version__,
        "tokenizer": {
            "type": config.tokenizer.tokenizer_type, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
        "json_key": key,
        "append_eod": config.append_eod,
        "shard": str(config.shard),
        "sources": [source.as_dict() for source in inputs],
        "documents": position.sets[number].documents,
        "tokens": position.sets[number].tokens,
        "text_bytes": position.text_bytes[number],
        "rejected": dict(position.rejected),
        "dtype": output.writers[number].format.name,
        "seconds": round(position.seconds, 3),
    }
