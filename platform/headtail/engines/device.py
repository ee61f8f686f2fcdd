"""Device, threads, precision and quiet of models that run in this process, in vLLM or torch itself. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from headtail.engines.base import ModelConfig

M = TypeVar("M", bound=ModelConfig)

# How long an OpenMP thread that waits looks before it sleeps, in turns of some 12 ns. A step of a small model is thousands of
# operations of some 20 us, and waking a thread takes as long; endless looking made a shared 2-core machine ten times slower.
SPINS = "3000"
_BF16 = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # as Linux names them; the last is Arm's
_BELOW_BF16 = ("SSE", "AVX2", "AVX512_CORE_VNNI")  # what oneDNN may be held to, by how it begins; and the names AVX and AVX512_CORE
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # of x86-64


def threads(config: ModelConfig) -> int:
    """CPU threads of one engine: the cores it was given, at least one."""
    return max(1, int(config.cpus))


def spin_briefly() -> None:
    """Bound how long this process's OpenMP threads look for work, unless its user did. Before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def set_environment(config: ModelConfig) -> None:
    """What must be in the environment before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not config.gpus:
        os.environ["OMP_NUM_THREADS"] = str(threads(config))  # Ray would set this to 1
        spin_briefly()


def cpu_flags(text: str) -> frozenset[str]:
    """The features of the first processor in the text of /proc/cpuinfo."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def computes_bf16(flags: Collection[str], environ: Mapping[str, str]) -> bool:
    """Whether a CPU multiplies bfloat16 itself; others turn it into float32 and back, slower than float32 throughout.

    `environ`: PyTorch (ATEN_CPU_CAPABILITY) and oneDNN (ONEDNN_MAX_CPU_ISA, DNNL_MAX_CPU_ISA) may be held to less than the CPU has.
    """
    held = (environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    low = held in ("AVX", "AVX512_CORE") or held.startswith(_BELOW_BF16) or environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2")
    return not low and not _BF16.isdisjoint(flags)


def machine_computes_bf16() -> bool:
    """`computes_bf16` of this machine. Where Linux does not describe the CPU, or does not let this process use its AMX: no."""
    return computes_bf16(machine_flags(), os.environ) and allow_amx()


def allow_amx() -> bool:
    """Ask Linux for AMX's registers, for this process and those that it forks. False: the CPU has them, and this process must not use them.

    A process that uses them unasked dies of an illegal instruction. oneDNN asks by itself, vLLM's attention does not: a first step of a few
    tokens, which oneDNN computes without AMX, then ends the process. Also called by vLLM in each of its processes, as a plugin
    (pyproject.toml). Source: Documentation/arch/x86/xstate.rst of Linux.
    """
    if "amx_tile" not in machine_flags():
        return True
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def machine_flags() -> frozenset[str]:
    """`cpu_flags` of this machine; none where Linux does not describe the CPU."""
    described = Path("/proc/cpuinfo")
    return cpu_flags(described.read_text()) if described.is_file() else frozenset()


def resolve_dtype(config: M) -> M:
    """`config` with the precision that `dtype: auto` means here: on a CPU bfloat16 where the CPU computes it, else float32.

    Who starts a job calls it once: the answer is part of every answer_key, and workers on other machines must not differ. On a GPU
    `auto` stays: weights are taken as they are stored.
    """
    if config.dtype != "auto" or config.gpus or not config.traits.in_process:
        return config
    return config.model_copy(update={"dtype": "bfloat16" if machine_computes_bf16() else "float32"})


def precision(config: ModelConfig) -> str:
    """The weights' type in this process: see `resolve_dtype`."""
    return resolve_dtype(config).dtype


def quiet_transformers() -> None:
    """transformers' bars and warnings off."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
