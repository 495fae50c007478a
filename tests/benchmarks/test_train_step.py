"""benchmarks/train_step.py and benchmarks/kernels.py as a user runs them, on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def profile_parts(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_parts", repository / "benchmarks/profile_parts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def turn_of(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`turn_of(**spec)`: one started measurement of the tiny model."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = {"model": "tiny", "layers": None, "micro_batch": 1, "tp": 1, "dp": 1, "steps": 2, "impl": "local",
            "recipe": None, "round": 0, "profile": False}
    return lambda **changed: importlib.import_module("train_step_turn").Turn({**spec, **changed}, tmp_path / "log")


def test_a_turn_waits_and_leaves_its_waiting_out(turn_of) -> None:
    with turn_of() as turn:
        turn.wait_until_ready(time.monotonic() + 120)
        time.sleep(8)
        assert not (turn._place / "result.json").exists() or "build" not in (turn._place / "result.json").read_text()
        run = turn.take(120)
    assert run["failed"] == {} and len(run["step_ms"]) == 2
    marks = run["start_s"]
    assert marks["import"] < marks["build"] < marks["first_step"] < marks["import"] + 7


def test_turns_that_are_late_or_nobodys(turn_of, monkeypatch: pytest.MonkeyPatch) -> None:
    with turn_of() as late:
        late.wait_until_ready(time.monotonic())
        assert late.take(120)["failed"]["process"]["reason"].startswith("stopped while it imported (--timeout)")
    with turn_of() as slow:
        slow.wait_until_ready(time.monotonic() + 120)
        assert slow.take(0)["failed"]["process"]["reason"].startswith("stopped after 0 s (--timeout)")
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(os, "getpid", lambda: ended.pid)
    with turn_of() as orphan:
        assert orphan._process.wait(120) == 1


def test_arms_are_measured_in_turn_and_compared(run_tool, tmp_path: Path):
    raw = tmp_path / "raw.json"
    said = run_tool("benchmarks/train_step.py", "--model", "tiny", "--impl", "local", "local",
                    "transformer_engine", "--against", "local", "--rounds", "2", "--steps", "2", "--profile",
                    "--json", raw, env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stdout + said.stderr
    results = json.loads(raw.read_text())
    assert [(run["round"], run["arm"]) for run in results["runs"]] == [
        (0, "local"), (0, "local #2"), (1, "local"), (1, "local #2")]
    for run in results["runs"]:
        assert len(run["fb_ms"]) == len(run["step_ms"]) == len(run["optimizer_ms"]) == 2
        assert run["failed"] == {} and 6 < run["loss"] < 8
        assert ("profile" in run) == (run["round"] == 0)
    first, second = results["runs"][:2]
    assert first["loss"] == second["loss"], "the arms saw the same tokens"
    assert "transformer_engine bf16: left out: not installed: transformer-engine" in said.stdout
    ratios = said.stdout.split("Times faster than local")[1].splitlines()[4]
    assert ratios.startswith("| local #2 | bf16 | ") and 0.2 < float(ratios.split("|")[3].split()[0]) < 5

    again = run_tool("benchmarks/train_step.py", "--show", raw)
    assert again.stdout.strip() in said.stdout


def test_a_failing_measurement_is_a_line_and_the_rest_goes_on(run_tool):
    said = run_tool("benchmarks/train_step.py", "--model", "tiny", "--impl", "local", "--rounds", "1",
                    "--timeout", "0.2")
    assert said.returncode == 1
    assert "FAILED local bf16, round 1, process: stopped while it imported (--timeout)" in said.stdout


def test_help_explains_the_parts_and_shows_commands(run_tool):
    said = run_tool("benchmarks/train_step.py", "--help")
    assert said.returncode == 0
    assert "forward and backward of one micro-batch" in said.stdout and "examples:" in said.stdout


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--show", "nowhere.json"], "--show nowhere.json: there is no such file"),
    (["--rounds", "0"], "'0' is not a whole number of 1 or more"),
    (["--json", "nowhere/raw.json"], "--json nowhere/raw.json: its folder does not exist")])
def test_mistakes_are_sentences(run_tool, flags: list[str], sentence: str):
    said = run_tool("benchmarks/train_step.py", *flags)
    assert said.returncode == 2 and sentence in said.stderr


def test_every_part_has_a_right_kernel_on_the_cpu(run_tool, tmp_path: Path):
    raw = tmp_path / "raw.json"
    said = run_tool("benchmarks/kernels.py", "--model", "tiny", "--device", "cpu", "--seconds", "0.002",
                    "--json", raw, env={"OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stdout + said.stderr
    parts = json.loads(raw.read_text())["parts"]
    assert len(parts) == 23
    for part in parts:
        assert part["candidates"] and part["floor_ms"] > 0
        assert all(0 <= one["error"] < 0.01 for one in part["candidates"].values())
    assert "fastest candidates" in said.stdout and "left out: quack-kernels: needs a GPU" in said.stdout


def test_kernels_are_timed_in_loops_too(run_tool, tmp_path: Path):
    raw = tmp_path / "raw.json"
    said = run_tool("benchmarks/kernels.py", "--model", "tiny", "--device", "cpu", "--only", "norm", "--sustained",
                    "--seconds", "0.002", "--json", raw)
    assert said.returncode == 0, said.stdout + said.stderr
    parts = json.loads(raw.read_text())["parts"]
    assert [part["part"] for part in parts] == ["norm forward", "norm backward"]
    for part in parts:
        assert all(len(one["ms"]) == 3 and min(one["ms"]) > 0 for one in part["candidates"].values())


@pytest.mark.parametrize(("kernel", "part"), [
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_segment_k_off_kernel",
     "products"),
    ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm90<GemmUniversal>>", "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", "products"),
    ("kernel_cutlass_kernel_quackgemm_default_epiGemmDefaultSm90_object_at__tensorptrbf16gmem_0", "products"),
    ("kernel_cutlass_kernel_quackgemm_actGemmGatedSm90_object_at__tensorptrbf16gmem_0", "products"),
    ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__0", "attention"),
    ("kernel_cutlass_kernel_megatronpretrainmodelfusedattention_backwardAttentionBackward_object_at__0", "attention"),
    ("rope_pack_sums", "rope"),
    ("kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess_object_0",
     "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_8_64x64x192", "attention"),
    ("kernel_cutlass_kernel_quackrmsnormRMSNorm_object_at__tensorptrbf16gmem_align16_0", "norm"),
    ("kernel_cutlass_kernel_quackrmsnormRMSNormBackward_object_at__tensorptrbf16gmem_0", "norm"),
    ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>", "norm"),
    ("rms_norm_forward", "norm"),
    ("void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "rope"),
    ("rope_rotate", "rope"),
    ("void transformer_engine::detail::cast_transpose_general_kernel<...>", "fp8 casts"),
    ("quantize_rows", "fp8 casts"),
    ("cast_transposed", "fp8 casts"),
    ("swiglu_quantize_forward", "activation"),
    ("triton_poi_fused_mul_silu_split_0", "activation"),
    ("cross_entropy_statistics", "loss"),
    ("cross_entropy_kernel", "loss"),
    ("online_softmax_kernel", "loss"),
    ("adam_update", "optimizer"),
    ("void transformer_engine::multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctorMaster<...>>",
     "optimizer"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>", "optimizer"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", "communication"),
    ("Memcpy PtoP (Device -> Device)", "communication"),
    ("Memcpy DtoD (Device -> Device)", "copies"),
    ("Memset (Device)", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
     "copies"),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "other"),
])
def test_kernels_are_told_apart_by_their_names(profile_parts: ModuleType, kernel: str, part: str):
    assert profile_parts.part_of(kernel) == part


def test_idle_time_is_what_no_kernel_covers(profile_parts: ModuleType):
    spans = [profile_parts.Span("nvjet_a", 0, 1000), profile_parts.Span("ncclDevKernel", 500, 2000),
             profile_parts.Span("adam_update", 3000, 4000), profile_parts.Span("nvjet_a", 3200, 3300)]
    summary = profile_parts.summarize(spans, wall_us=5000, steps=1)
    assert summary["busy_ms"] == pytest.approx(3) and summary["idle_ms"] == pytest.approx(2)
    assert summary["parts_ms"] == pytest.approx({"communication": 1.5, "optimizer": 1, "products": 1.1})
    assert summary["longest"][0]["name"] == "ncclDevKernel"
    assert summary["longest"][1] == {
        "name": "nvjet_a", "part": "products", "ms": pytest.approx(1.1), "calls": 2}
