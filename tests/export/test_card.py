"""The model card: what it says, that it is true, and what it leaves out."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
import torch
import yaml

from megatron.pretrain.checkpoint.manifest import read_manifest
from megatron.pretrain.export import card
from megatron.pretrain.export.card import model_card
from megatron.pretrain.export.elements import BF16
from megatron.pretrain.export.shape import model_shape


@pytest.fixture(scope="module")
def manifest(written):
    return read_manifest(written)


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))


def card_of(manifest) -> str:
    return model_card(manifest, model_shape(manifest, 1000), "LlamaForCausalLM", BF16, 214336, "mine")


def test_the_card_says_from_what_the_model_was_made(manifest, repository):
    versions = {"torch": "2.9", "te": "absent"}
    manifest = dataclasses.replace(manifest, mixture_hash="ab" * 32, versions=versions)
    said = rows(card_of(manifest))
    assert said["iteration"] == "100" and said["tokens seen"] == "102,400"
    assert said["mixture (SHA-256)"] == f"`{'ab' * 32}`"
    assert said["tokenizer (SHA-256)"] == f"`{manifest.tokenizer['fingerprint']}`"
    assert said["trained with"] == "torch 2.9"
    release = torch.__version__.partition("+")[0]  # of some builds the installed version lacks what follows
    assert f"torch {release}" in said["converted with"]
    assert said["parameters"] == "214,336" and said["type of the weights"] == "`bfloat16`"
    assert said["attention"] == "4 heads of 16, 2 for keys and values"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, text=True, capture_output=True)
    if head.returncode == 0:
        assert said["converter's git commit"].strip("`").removesuffix("-dirty") == head.stdout.strip()


def test_what_is_unknown_is_left_out(manifest, monkeypatch):
    monkeypatch.setattr(card, "_git_commit", lambda: None)
    said = rows(card_of(dataclasses.replace(manifest, mixture_hash="", versions={})))
    assert not {"mixture (SHA-256)", "trained with", "converter's git commit"} & said.keys()


def test_the_head_is_yaml_that_the_hub_reads(manifest):
    head = yaml.safe_load(card_of(manifest).split("---\n")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pretrained"]}
