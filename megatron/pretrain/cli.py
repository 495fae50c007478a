"""From a command line and a YAML file to a `RunConfig`: flags win over the file, the file over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.pretrain import megatron_flags
from megatron.pretrain.config import SECTIONS, RunConfig
from megatron.pretrain.data.yaml_lines import Scalar, read_mapping, scalar
from megatron.pretrain.errors import UserError

REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
            "micro_batch_size", "train_iters", "lr")

_DESCRIPTION = """\
Pre-train a NEO model. Start it with torchrun, or with a launcher of neo/scripts.
Flags have Megatron-LM's names, and '_' and '-' are the same in them."""

_EPILOG = f"""\
Flags of Megatron-LM that say what is always so here are taken, and change nothing:
{textwrap.fill(" ".join(megatron_flags.STATEMENTS), 78, initial_indent="  ", subsequent_indent="  ",
               break_on_hyphens=False)}

examples:
  torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 4 --hidden-size 256 --ffn-hidden-size 1024 \\
    --num-attention-heads 4 --seq-length 512 --micro-batch-size 2 --train-iters 100 --lr 1e-3 \\
    --tokenizer-model neo/tokenizer.model --data-path my-corpus_text_document --save out/checkpoint
  torchrun --nproc_per_node 8 pretrain_gpt.py --config run.yaml --lr 2e-4"""


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
    given = vars(_parse_flags(parser, argv))
    if "config" in given:
        given = {**_read_yaml(Path(given["config"]), parser), **given}
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
    if model.kv_channels is None and model.num_attention_heads > 0:
        if model.hidden_size % model.num_attention_heads:
            raise UserError(
                f"--hidden-size {model.hidden_size} is not a multiple of --num-attention-heads "
                f"{model.num_attention_heads}; give the head dimension with --kv-channels")
        model = dataclasses.replace(model, kv_channels=model.head_dim)
    if model.max_position_embeddings is None:
        model = dataclasses.replace(model, max_position_embeddings=config.data.seq_length)
    if train.recompute_activations and train.recompute_granularity is None:
        train = dataclasses.replace(train, recompute_granularity="selective")
    if train.fp8:
        train = dataclasses.replace(train, fp8_format="hybrid")
    return dataclasses.replace(config, model=model, train=train)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Two columns, with a switch and its opposite told as one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is a `UserError`."""

    @property
    def known(self) -> Iterable[str]:
        """Every spelling of every flag."""
        return self._option_string_actions

    def error(self, message: str) -> typing.NoReturn:
        sentence = message.removeprefix("argument ")
        for theirs, ours in (("ignored explicit argument", "takes no value, but was given"),
                             ("expected one argument", "needs a value"),
                             ("expected at least one argument", "needs at least one value")):
            sentence = sentence.replace(theirs, ours)
        raise UserError(sentence)


def _parser(prog: str) -> _Parser:
    # SUPPRESS keeps what was not given out of the namespace, so that flags lie over the file's values.
    parser = _Parser(
        prog=prog, usage="torchrun [...] %(prog)s FLAGS", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=_Help)
    parser.add_argument("--config", metavar="FILE.yaml", help="Flags as 'name: value' lines; flags of the "
                        "command line win.")
    parser.add_argument("--dry-run", action="store_true", help="Print the size and the arithmetic of the "
                        "run; start and create nothing.")
    for name, kind in SECTIONS.items():
        group = parser.add_argument_group(name, kind.__doc__)
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
    kind, flags, help_text = _plain_type(hint), [_flag(field.name), *field.metadata["aliases"]], _help(field)
    if kind is bool:
        action = "store_true" if field.name.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(*flags, dest=field.name, action=action, help=help_text)
    elif kind is tuple:
        group.add_argument(*flags, dest=field.name, nargs="+", action=_Tuple, help=help_text, metavar="WORD")
    else:
        group.add_argument(*flags, dest=field.name, type=_NAMED[kind], help=help_text,
                           choices=field.metadata["choices"] or None, metavar=_metavar(field, kind))


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"]
    if field.name in REQUIRED:
        return f"{text} Required."
    is_evident = field.default is None or isinstance(field.default, (bool, tuple))
    return text if is_evident else f"{text} (default: {field.default})"


def _metavar(field: dataclasses.Field, kind: type) -> str:
    choices = field.metadata["choices"]
    # A list that would fill lines of its own is told by the help text, and so is a single choice.
    return "{" + ",".join(choices) + "}" if 1 < len(choices) < 5 else _METAVARS[kind]


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
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


_NAMED = {int: _whole_number, float: _number, str: str}
_METAVARS = {int: "N", float: "X", str: "NAME"}


def _plain_type(hint: Any) -> type:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    return typing.get_origin(hint) or hint


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _parse_flags(parser: _Parser, argv: Iterable[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args([_with_dashes(token) for token in argv])
    if unknown:
        raise UserError(_about_unknown(unknown[0], parser))
    return namespace


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
    if megatron_flags.is_unsupported(flag):
        return f"{flag} is a flag of Megatron-LM that is not supported here"
    nearest = difflib.get_close_matches(flag, parser.known, n=1)
    return f"unknown flag {flag}" + (f"; the nearest known one is {nearest[0]}" if nearest else "")


def _read_yaml(path: Path, parser: _Parser) -> dict[str, Any]:
    """The file's `name: value` lines, read as the flags they stand for."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; it must name a YAML file") from None
    found: dict[str, Any] = {}
    for key, node in read_mapping(content, str(path)).items():
        flags = _flags_of_line(key, node, str(path), parser)
        try:
            found |= vars(_parse_flags(parser, flags))
        except UserError as mistake:
            raise UserError(f"{key.where}: {mistake}") from None
    return found


def _flags_of_line(key: Scalar, node: yaml.Node, name: str, parser: _Parser) -> list[str]:
    flag = _flag(key.text)
    if flag == "--config":
        raise UserError(f"{key.where}: config: one YAML file cannot name another")
    if isinstance(node, yaml.SequenceNode):
        return [flag, *(scalar(item, name, f"each item of {key.text}").text for item in node.value)]
    value = scalar(node, name, f"the value of {key.text}").text
    if not node.tag.endswith(":bool"):
        return [f"{flag}={value}"]
    if yaml.SafeLoader.bool_values[value.lower()]:
        return [flag]
    if flag in megatron_flags.STATEMENTS:
        raise UserError(f"{key.where}: {key.text}: {value}: not supported; it is always so here")
    refusal = "--no-" + flag.removeprefix("--")
    # A flag that can only be given, such as --no-load-optim, is left out instead.
    return [refusal] if refusal in parser.known or flag not in parser.known else []
