"""Precision by what a CPU computes, decided once per job."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import EXAMPLES
from headtail.engines import ModelConfig, device
from headtail.engines.device import allow_amx, computes_bf16, cpu_flags, precision, resolve_dtype
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


GRANTED = """
import ctypes
from headtail.engines import device
flags = device.machine_flags()
allowed, bits = device.allow_amx(), ctypes.c_uint64(0)
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(bits))  # ARCH_GET_XCOMP_PERM
print(allowed == ("amx_tile" not in flags or bool(bits.value >> 18 & 1)))
"""


def test_linux_is_asked_for_amx() -> None:
    """In a process of its own: what was granted stays."""
    assert subprocess.run([sys.executable, "-c", GRANTED], capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_cpu_with_amx_that_linux_does_not_grant_computes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "machine_flags", lambda: cpu_flags("flags : avx512_bf16 amx_tile amx_bf16\n"))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for granted, dtype in ((0, "bfloat16"), (-1, "float32")):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, code=granted: SimpleNamespace(syscall=lambda *call: code))
        assert precision(ModelConfig()) == dtype


def test_vllm_asks_for_amx_in_each_of_its_processes() -> None:
    """Its plugin is installed: pip puts it into the environment from pyproject.toml."""
    [plugin] = [found for found in entry_points(group="vllm.general_plugins") if found.name == "headtail_amx"]
    assert plugin.load() is allow_amx
