"""From a command line and a YAML file to a `RunConfig`: flags win over the file, the file over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.pretrain import megatron_flags
from megatron.pretrain.config import SECTIONS, RunConfig
from megatron.pretrain.errors import UserError

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
            "micro_batch_size", "train_iters", "lr")


@dataclass(frozen=True)
class Invocation:
    """What the command line asked for: a run, or only a look at it."""

    config: RunConfig
    dry_run: bool


def parse(argv: Sequence[str], prog: str = "pretrain_gpt.py") -> Invocation:
    """Read the flags of `argv` over those of `--config FILE.yaml`.

    Raises UserError for an unknown flag (with the nearest known one), a flag of Megatron-LM that is not
    supported, a value of the wrong kind, and a required flag that is missing.
    """
    parser = _parser(prog)
    given = vars(_parse_flags(parser, argv, origin=""))
    if given.get("config"):
        from_file = _parse_flags(parser, _flags_of_yaml(Path(given["config"])), f"{given['config']}: ")
        given = {**vars(from_file), **given}
    missing = [name for name in REQUIRED if given.get(name) is None]
    if missing:
        flags = ", ".join(_flag(name) for name in missing)
        raise UserError(f"{flags}: required, but neither the command line nor --config gives it")
    sections = {
        name: kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given})
        for name, kind in SECTIONS.items()}
    return Invocation(_resolve(RunConfig(**sections)), dry_run=given.get("dry_run", False))


def _resolve(config: RunConfig) -> RunConfig:
    """Fill in what follows from other flags and needs no world size, so that a saved config is explicit."""
    model, train = config.model, config.train
    if model.num_query_groups is None:
        groups = 1 if model.group_query_attention else model.num_attention_heads
        model = dataclasses.replace(model, num_query_groups=groups)
    if model.kv_channels is None:
        if model.hidden_size % model.num_attention_heads:
            raise UserError(
                f"--hidden-size {model.hidden_size} is not a multiple of --num-attention-heads "
                f"{model.num_attention_heads}; give the head dimension with --kv-channels")
        model = dataclasses.replace(model, kv_channels=model.head_dim)
    if model.max_position_embeddings is None:
        model = dataclasses.replace(model, max_position_embeddings=config.data.seq_length)
    if train.recompute_activations and train.recompute_granularity is None:
        train = dataclasses.replace(train, recompute_granularity="selective")
    return dataclasses.replace(config, model=model, train=train)


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is a `UserError`."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument "))


def _parser(prog: str) -> _Parser:
    # SUPPRESS keeps what was not given out of the namespace, so that flags lie over the file's values.
    parser = _Parser(
        prog=prog, usage="torchrun [...] %(prog)s FLAGS", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Pre-train a NEO model. Start it with torchrun or with a launcher of neo/scripts; "
        "flags have Megatron-LM's names, and '_' and '-' are the same in them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  torchrun --nproc_per_node 2 pretrain_gpt.py --config run.yaml --lr 2e-4")
    parser.add_argument("--config", metavar="FILE.yaml", help="Flags as 'name: value' lines; flags of the "
                        "command line win.")
    parser.add_argument("--dry-run", action="store_true", help="Print the size and the arithmetic of the "
                        "run; start and create nothing.")
    for kind in SECTIONS.values():
        group = parser.add_argument_group(kind.__name__, kind.__doc__)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _add_flag(group, field, hints[field.name])
    for flag, statement in megatron_flags.STATEMENTS.items():
        parser.add_argument(flag, nargs=statement.values_count, dest=argparse.SUPPRESS,
                            help=argparse.SUPPRESS, action=_Statement)
    return parser


class _Statement(argparse.Action):
    """A flag of Megatron-LM that says what is always so here: accepted if true, refused if not."""

    def __call__(self, parser, namespace, values, option_string=None):
        statement = megatron_flags.STATEMENTS[option_string]
        given = " ".join(values) if isinstance(values, list) else values
        if statement.allowed is not None and given not in statement.allowed:
            raise UserError(f"{option_string} {given}: not supported; {statement.why}")


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    kind, help_text = _plain_type(hint), field.metadata["help"]
    if field.default not in (None, (), False):
        help_text += f" (default: {field.default})"
    flags = [_flag(field.name), *field.metadata["aliases"]]
    if kind is bool:
        action = "store_true" if field.name.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(*flags, dest=field.name, action=action, help=help_text)
    elif kind is tuple:
        group.add_argument(*flags, dest=field.name, nargs="+", action=_Tuple, help=help_text, metavar="X")
    else:
        group.add_argument(*flags, dest=field.name, type=_NAMED[kind], help=help_text,
                           choices=field.metadata["choices"] or None,
                           metavar=None if field.metadata["choices"] else kind.__name__.upper())


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_NAMED = {int: _whole_number, float: _number, str: str}


def _plain_type(hint: Any) -> type:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    return typing.get_origin(hint) or hint


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _parse_flags(parser: _Parser, argv: Iterable[str], origin: str) -> argparse.Namespace:
    """Parse `argv`, with the sentence about a mistake led by `origin`."""
    try:
        namespace, unknown = parser.parse_known_args([_with_dashes(token) for token in argv])
        if unknown:
            raise UserError(_about_unknown(unknown[0], parser))
        return namespace
    except UserError as mistake:
        raise UserError(f"{origin}{mistake}") from None


def _with_dashes(token: str) -> str:
    """Flags of Megatron-LM mix '_' and '-' (--override-opt_param-scheduler); here they are the same."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def _about_unknown(token: str, parser: _Parser) -> str:
    flag = token.partition("=")[0]
    if not flag.startswith("--"):
        return f"{token!r} stands where a flag was expected"
    if flag in megatron_flags.UNSUPPORTED:
        return f"{flag} is a flag of Megatron-LM that is not supported here"
    nearest = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"unknown flag {flag}" + (f"; the nearest known one is {nearest[0]}" if nearest else "")


def _flags_of_yaml(path: Path) -> list[str]:
    """The file's `name: value` lines as the flags they stand for."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; it must name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be 'flag: value' lines, with Megatron-LM's flag names")
    argv: list[str] = []
    for name, value in content.items():
        argv += _flag_of_pair(str(name), value, path)
    return argv


def _flag_of_pair(name: str, value: Any, path: Path) -> list[str]:
    flag = _flag(name)
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [flag, *(str(item) for item in value)]
    if isinstance(value, (int, float, str)):
        return [f"{flag}={value}"]
    raise UserError(f"{path}: {name}: {value!r} is neither a plain value nor a list")
