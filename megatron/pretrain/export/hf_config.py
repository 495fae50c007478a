"""config.json of a Hugging Face folder: written from a model's shape, and read back into one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.elements import ElementType
from megatron.pretrain.export.names import ARCHITECTURES, Architecture
from megatron.pretrain.export.shape import ModelShape

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class SpecialIds:
    """Ids that begin and end a text. `eod` ends a document in the training data; mostly it is `eos`."""

    bos: int | None
    eos: int | None
    eod: int | None


def config_json(architecture: Architecture, shape: ModelShape, ids: SpecialIds,
                dtype: ElementType) -> dict[str, Any]:
    """The content of config.json.

    The base of the rotary embedding and the type are there twice, as transformers 4 and 5 name them.
    """
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **architecture.config,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "max_position_embeddings": shape.max_position_embeddings,
        "initializer_range": shape.init_method_std,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
        "use_cache": True,
    }


def generation_config(ids: SpecialIds) -> dict[str, Any]:
    """generation_config.json: generation stops at the end of a text, and at the end of a document."""
    ends = list(dict.fromkeys(end for end in (ids.eos, ids.eod) if end is not None))
    return {"bos_token_id": ids.bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def read_config(folder: Path) -> tuple[Architecture, ModelShape]:
    """Architecture and shape of the model in `folder`.

    Raises UserError where config.json is missing or damaged, names an architecture that has no table, or
    asks for what Megatron's layers, as they are built here, do not compute.
    """
    path = folder / CONFIG_FILE
    config = _read_json(path)
    architecture = _architecture(config, path)
    _check_settings(config, architecture, path)
    try:
        return architecture, _shape(config, path)
    except KeyError as missing:
        raise UserError(f"{path} does not say {missing}, which a {architecture.name} needs") from None
    except (TypeError, ValueError, ZeroDivisionError) as problem:
        raise UserError(f"{path} is no configuration of a {architecture.name}: {problem}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: give a Hugging Face folder, with {CONFIG_FILE} and .safetensors")
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config


def _architecture(config: dict[str, Any], path: Path) -> Architecture:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise UserError(f"{path} describes a {name}; those that can be converted are "
                        f"{', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _check_settings(config: dict[str, Any], architecture: Architecture, path: Path) -> None:
    wanted = {"hidden_act": "silu", **architecture.config}
    for key, value in wanted.items():
        # What transformers takes for a setting that is absent: false for a switch; but a window, for a model
        # that knows them, of some length.
        said = config.get(key, "not said" if value is None else value)
        if said != value:
            raise UserError(f"{path}: {key} is {said}, but only {orjson.dumps(value).decode()} is computed "
                            "by the layers that Megatron's side is built from")
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: its rotary embedding is scaled or partial ({kind}), but only a plain one "
                        "over the whole head is computed by the layers that Megatron's side is built from")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, where transformers 5 or else 4 puts them."""
    return {**{key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config},
            **(config.get("rope_parameters") or config.get("rope_scaling") or {})}


def _shape(config: dict[str, Any], path: Path) -> ModelShape:
    hidden_size, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if heads % groups:
        raise UserError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
                        f"{groups}")
    return ModelShape(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden_size,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=int(config.get("head_dim") or hidden_size // heads),
        max_position_embeddings=int(config["max_position_embeddings"]),
        norm_epsilon=float(config["rms_norm_eps"]),
        rotary_base=float(_rope(config).get("rope_theta", 10000.0)),
        init_method_std=float(config.get("initializer_range", 0.02)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        vocab_size=int(config["vocab_size"]))
