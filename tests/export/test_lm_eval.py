"""lm-eval, where it is installed, on a converted folder, with a task of this repository and no network."""

from __future__ import annotations

import importlib.util
import json

import pytest

from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval: pip install 'lm-eval[hf]'", allow_module_level=True)


def test_it_scores_the_folder(written, run_tool, tmp_path):
    run_conversion(plan_conversion(written, Options()), tmp_path / "hf")
    outcome = run_tool(
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32",
        "--tasks", "sums", "--include_path", "benchmarks/lm_eval", "--device", "cpu",
        "--output_path", tmp_path / "scores",
        env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert outcome.returncode == 0, outcome.stderr
    scores, = (tmp_path / "scores").rglob("results_*.json")
    said = json.loads(scores.read_text())
    assert said["n-samples"]["sums"]["effective"] == 20
    assert 0 <= said["results"]["sums"]["acc,none"] <= 1
