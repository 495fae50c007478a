"""YAML whose mistakes can be pointed at: keys and values keep their lines, digits stay text."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from megatron.pretrain.errors import UserError


@dataclass(frozen=True)
class Scalar:
    """A plain value as it is written, and where it stands ("mixture_cfg.yml, line 7")."""

    text: str
    where: str


def read_mapping(content: bytes, name: str) -> dict[Scalar, yaml.Node]:
    """The `key: value` lines of a file called `name`.

    Raises UserError for what is not valid YAML, no mapping, or has a key twice.
    """
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{name}, line {mark.line + 1}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{name}: not valid YAML: {error.reason} at byte {error.position}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: must be 'KEY: value' lines")
    return pairs(root, name)


def pairs(node: yaml.MappingNode, name: str) -> dict[Scalar, yaml.Node]:
    """A mapping's keys and values, in their order; the nodes know their lines."""
    found: dict[Scalar, yaml.Node] = {}
    lines: dict[str, str] = {}
    for key_node, value in node.value:
        key = scalar(key_node, name, "a key")
        if key.text in lines:
            # YAML itself would keep the last of the two without a word.
            raise UserError(f"{key.where}: {key.text} stands twice, first at {lines[key.text]}")
        lines[key.text] = key.where
        found[key] = value
    return found


def scalar(node: yaml.Node, name: str, what: str) -> Scalar:
    """The node's text; raises UserError if it is a list, a mapping or nothing."""
    where = f"{name}, line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode) or not node.value or node.tag.endswith(":null"):
        raise UserError(f"{where}: {what} must be one plain value")
    return Scalar(node.value, where)
