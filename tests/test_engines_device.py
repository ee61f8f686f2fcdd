"""Precision by what a CPU computes, decided once per job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import EXAMPLES
from headtail.engines import ModelConfig, device
from headtail.engines.device import computes_bf16, cpu_flags, precision, resolve_dtype
from headtail.stages.distill import stage as distill
from headtail.stages.precompute import stage as precompute

SERVER = "processor\t: 0\nmodel name\t: x\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
LAPTOP = "flags\t\t: fpu sse4_1 avx avx2 fma\n"
ARM = "Features\t: fp asimd bf16 sve\n"


@pytest.mark.parametrize(
    "text, environ, computed",
    [
        (SERVER, {}, True),
        (ARM, {}, True),
        (LAPTOP, {}, False),
        ("flags : fpu avx512f avx512vl\n", {}, False),
        ("flags : amx_tile amx_bf16\n", {}, True),
        ("", {}, False),
        (SERVER, {"ATEN_CPU_CAPABILITY": "avx2"}, False),
        (SERVER, {"ATEN_CPU_CAPABILITY": "default"}, False),
        (SERVER, {"ATEN_CPU_CAPABILITY": "avx512"}, True),
        *((SERVER, {"ONEDNN_MAX_CPU_ISA": isa}, False) for isa in ("SSE41", "AVX", "avx2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")),
        *(
            (SERVER, {"ONEDNN_MAX_CPU_ISA": isa}, True)
            for isa in ("AVX512_CORE_BF16", "AVX512_CORE_AMX", "AVX10_1_512", "ALL", "DEFAULT", "")
        ),
        (SERVER, {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
    ],
)
def test_a_cpu_computes_bfloat16_or_not(text: str, environ: dict[str, str], computed: bool) -> None:
    assert computes_bf16(cpu_flags(text), environ) is computed


@pytest.mark.parametrize("has, dtype, trained", [(True, "bfloat16", "bf16"), (False, "float32", "fp32")])
def test_auto_is_what_the_cpu_computes_and_a_choice_or_a_gpu_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, has: bool, dtype: str, trained: str
) -> None:
    monkeypatch.setattr(device, "machine_computes_bf16", lambda: has)
    monkeypatch.setattr(distill, "machine_computes_bf16", lambda: has)
    assert precision(ModelConfig()) == resolve_dtype(ModelConfig()).dtype == dtype
    assert precision(ModelConfig(dtype="float16")) == "float16"
    for kept in (ModelConfig(gpus=1), ModelConfig(engine="null"), ModelConfig(engine="openai")):
        assert resolve_dtype(kept) == kept
    assert distill._resolve_precision(distill.Config()).precision == trained
    assert distill._resolve_precision(distill.Config(gpus_per_worker=1)).precision == "bf16"
    assert distill._resolve_precision(distill.Config(zero_stage=0)).precision == "fp32", "it would keep no fp32 master weights"
    assert distill._resolve_precision(distill.Config(precision="fp32")).precision == "fp32"


def test_the_driver_decides_for_all_workers_and_the_answers_keys(
    monkeypatch: pytest.MonkeyPatch, root: str, tmp_path: Path, segmentation: Any
) -> None:
    """A worker on another kind of CPU computes as the driver said, and keys tell float32 from bfloat16."""
    from headtail.examples import example_data

    made = example_data.run(example_data.Config(root=root, tracking={"enabled": False}, events=300, days=2, train=8, labels=8, seed=3))
    model = ModelConfig(model=str(EXAMPLES / "models" / "teacher"))
    found = {}
    for has in (True, False):
        monkeypatch.setattr(device, "machine_computes_bf16", lambda has=has: has)
        config = precompute._resolve_model(
            precompute.Config(root=root, inputs=(f"{made.path}:human_labels_query_segmentation",), model=model)
        )
        job = precompute._job(config, precompute._find(config), "precompute/x")
        monkeypatch.setattr(device, "machine_computes_bf16", lambda has=has: not has)
        assert precision(job.model) == ("bfloat16" if has else "float32")
        found[job.settings] = precompute._folder(config, precompute._find(config))
    assert len(found) == len(set(found.values())) == 2
