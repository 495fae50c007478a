"""Which sources a run is made of: `mixture_cfg.yml` in, a blend and the length of the run out.

Rounds are read as exact fractions, never as floats: 0.29 rounds of 100 tokens are 29, not 28.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import yaml

from megatron.pretrain.data.blend import is_dataset
from megatron.pretrain.data.yaml_lines import Scalar, pairs, read_mapping, scalar
from megatron.pretrain.errors import UserError

ROUND_SUFFIX = "_ROUND"
PLAIN_KEYS = ("GLOBAL_BATCH_SIZE", "SEQ_LEN", "TOKEN_COUNTS")
_TOKENS_A_LETTER = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Source:
    """A dataset, and how often a run passes over it."""

    prefix: str
    """Path of the .bin file without its suffix."""
    tokens: int
    rounds: Fraction

    @property
    def weight_tokens(self) -> int:
        """Tokens that the run takes from this source: tokens x rounds, cut to a whole number."""
        return math.floor(self.tokens * self.rounds)


@dataclass(frozen=True)
class Mixture:
    """What a `mixture_cfg.yml` says, with every token count known."""

    sources: tuple[Source, ...]
    """Rounds in the order of the file, paths sorted within a round; a path twice counts twice."""
    global_batch_size: int
    seq_len: int
    config_path: Path
    config_hash: str
    """sha256 of the YAML's bytes, in hex."""
    notes: tuple[str, ...] = ()
    """What a person should know although it stops nothing."""

    @property
    def tokens_an_iteration(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def total_tokens(self) -> int:
        """Tokens x rounds over all sources: summed exactly, and only then cut to a whole number."""
        return math.floor(sum(source.tokens * source.rounds for source in self.sources))

    @property
    def train_iters(self) -> int:
        """Whole optimizer steps that the tokens suffice for."""
        return self.total_tokens // self.tokens_an_iteration

    @property
    def mixture_string(self) -> str:
        """`weight prefix weight prefix`: what --data-path takes."""
        return " ".join(f"{source.weight_tokens} {source.prefix}" for source in self.sources)

    def epochs(self) -> dict[str, float]:
        """Prefix -> passes over its tokens in the whole run, all its entries together."""
        weights: Counter[str] = Counter()
        for source in self.sources:
            weights[source.prefix] += source.weight_tokens
        trained = Fraction(self.train_iters * self.tokens_an_iteration, weights.total())
        return {source.prefix: float(weights[source.prefix] * trained / source.tokens)
                for source in self.sources}


def load_mixture(config_path: str | Path, token_counts: Mapping[str, int | str] | None = None) -> Mixture:
    """Read a mixture's YAML file, and the token counts of its sources.

    A source's tokens are read off its .idx file, unless TOKEN_COUNTS of the file, or else
    `token_counts` (.bin path -> a number, or text such as "1.5B"), gives them. Relative paths are
    relative to the current directory.

    Raises UserError, naming the file and the line, for anything that makes no mixture.
    """
    path = Path(config_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a mixture's YAML file") from None
    entries = read_mapping(content, str(path))
    for key in entries:
        _check_key(key)
    nodes = {key.text: (key, node) for key, node in entries.items()}
    counts = _Counts({_name(name): _token_count(Scalar(str(count), f"DB2TOKCNT, {name}"))
                      for name, count in (token_counts or {}).items()},
                     _counts_section(path, nodes.get("TOKEN_COUNTS")))
    mixture = Mixture(
        sources=tuple(_sources(path, entries, counts)),
        global_batch_size=_positive(path, nodes, "GLOBAL_BATCH_SIZE"),
        seq_len=_positive(path, nodes, "SEQ_LEN"),
        config_path=path.resolve(),
        config_hash=hashlib.sha256(content).hexdigest(),
        notes=counts.notes())
    _check_length(mixture, path)
    return mixture


def _sources(path: Path, entries: Mapping[Scalar, yaml.Node], counts: _Counts) -> Iterator[Source]:
    round_keys = [key for key in entries if key.text.endswith(ROUND_SUFFIX)]
    if not round_keys:
        raise UserError(f"{path}: no rounds; list .bin paths under a key such as 1.0{ROUND_SUFFIX}:")
    for key in round_keys:
        rounds = _rounds(key)
        for item in sorted(_items(path, key, entries[key]), key=lambda item: item.text):
            yield Source(_prefix(item), counts.tokens(item), rounds)


def _check_key(key: Scalar) -> None:
    if key.text in PLAIN_KEYS or key.text.endswith(ROUND_SUFFIX):
        return
    nearest = difflib.get_close_matches(key.text.upper(), (*PLAIN_KEYS, f"1.0{ROUND_SUFFIX}"), n=1)
    raise UserError(f"{key.where}: unknown key {key.text}"
                    + (f"; the nearest known one is {nearest[0]}" if nearest else
                       f"; known are {', '.join(PLAIN_KEYS)} and <number>{ROUND_SUFFIX}"))


def _positive(path: Path, nodes: Mapping[str, tuple[Scalar, yaml.Node]], key: str) -> int:
    if key not in nodes:
        raise UserError(f"{path}: {key} is missing; give it as '{key}: <whole number>'")
    value = scalar(nodes[key][1], str(path), key)
    if not re.fullmatch(r"\d+", value.text) or int(value.text) == 0:
        raise UserError(f"{value.where}: {key} is {value.text!r}, it must be a whole number above 0")
    return int(value.text)


def _rounds(key: Scalar) -> Fraction:
    text = key.text.removesuffix(ROUND_SUFFIX)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text):
        raise UserError(f"{key.where}: {key.text}: {text!r} is not a number of rounds, "
                        f"such as 1.5{ROUND_SUFFIX}")
    rounds = Fraction(text)
    if rounds <= 0:
        raise UserError(f"{key.where}: {key.text}: rounds must be above 0; "
                        "to leave these sources out, delete the list")
    return rounds


def _items(path: Path, key: Scalar, node: yaml.Node) -> list[Scalar]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"{key.where}: {key.text} must be a list of one .bin path or more ('- my.bin' lines)")
    return [scalar(item, str(path), f"a path of {key.text}") for item in node.value]


def _prefix(item: Scalar) -> str:
    if not item.text.endswith(".bin"):
        raise UserError(f"{item.where}: {item.text!r} must be a path that ends in .bin")
    if item.text.split() != [item.text]:
        raise UserError(f"{item.where}: {item.text!r} has a space in it, which a blend cannot hold")
    return item.text.removesuffix(".bin")


def _check_length(mixture: Mixture, path: Path) -> None:
    for source in mixture.sources:
        if source.weight_tokens == 0:
            raise UserError(f"{path}: {source.prefix}: {float(source.rounds):g} rounds of {source.tokens} "
                            "tokens are less than one token; leave the source out")
    if mixture.train_iters == 0:
        fits = mixture.total_tokens // mixture.seq_len
        remedy = (f"lower GLOBAL_BATCH_SIZE to {fits} or less" if fits
                  else f"lower SEQ_LEN to {mixture.total_tokens} or less")
        raise UserError(
            f"{path}: {mixture.total_tokens:,} tokens are less than one iteration of GLOBAL_BATCH_SIZE "
            f"{mixture.global_batch_size} x SEQ_LEN {mixture.seq_len} = {mixture.tokens_an_iteration:,}; "
            f"{remedy}, or add data")


# --- token counts ------------------------------------------------------------------------------------


def _token_count(count: Scalar) -> int:
    """A count in digits or with a letter: 1500000000, 1_500_000_000, "1.5B"."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMBT]?)", count.text.strip().upper())
    tokens = Fraction(match[1].replace("_", "")) * _TOKENS_A_LETTER[match[2]] if match else Fraction(0)
    if tokens <= 0 or tokens.denominator != 1:
        raise UserError(f"{count.where}: {count.text!r} is not a number of tokens; "
                        "it must be a whole number above 0, or such as 1.5B")
    return int(tokens)


def _name(bin_path: str) -> str:
    """One name for the spellings of a path: ./a.bin, a.bin and a."""
    return os.path.normpath(bin_path.removesuffix(".bin"))


def _counts_section(path: Path, entry: tuple[Scalar, yaml.Node] | None) -> dict[str, tuple[int, str]]:
    """Name of a source -> (tokens, where it is said)."""
    if entry is None:
        return {}
    key, node = entry
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{key.where}: TOKEN_COUNTS must be 'path.bin: tokens' lines")
    section = {}
    for name, value in pairs(node, str(path)).items():
        count = scalar(value, str(path), f"the tokens of {name.text}")
        section[_name(name.text)] = (_token_count(count), name.where)
    return section


class _Counts:
    """Token counts of sources: what was typed in wins over what the .idx says."""

    def __init__(self, from_source: Mapping[str, int], from_config: Mapping[str, tuple[int, str]]):
        self._from_source = from_source
        self._from_config = from_config
        self._used: set[str] = set()
        self._differences: list[str] = []

    def tokens(self, item: Scalar) -> int:
        name = _name(item.text)
        given = self._given(name)
        in_file = _tokens_in_file(_prefix(item))
        if given is None and in_file is None:
            raise UserError(
                f"{item.where}: {_prefix(item)}.idx does not exist (relative paths start at {os.getcwd()}); "
                "make it with tools/preprocess_data.py, or give the number of its tokens under TOKEN_COUNTS:")
        if given is not None and in_file is not None and given != in_file and name not in self._used:
            self._differences.append(f"{item.where}: {item.text} is taken to have {given:,} tokens as typed "
                                     f"in, its .idx says {in_file:,}")
        self._used.add(name)
        tokens = in_file if given is None else given
        if tokens == 0:
            raise UserError(f"{item.where}: {item.text} has no tokens; leave it out")
        return tokens

    def _given(self, name: str) -> int | None:
        if name in self._from_config:
            return self._from_config[name][0]
        return self._from_source.get(name)

    def notes(self) -> tuple[str, ...]:
        unused = [f"{where}: TOKEN_COUNTS names {name}, which no {ROUND_SUFFIX} list does"
                  for name, (_, where) in self._from_config.items() if name not in self._used]
        return (*self._differences, *unused)


def _tokens_in_file(prefix: str) -> int | None:
    from megatron.pretrain.data.indexed import count_tokens

    return count_tokens(prefix) if is_dataset(prefix) else None
