"""Device, threads, precision and quiet of models that run in this process, in vLLM or torch itself. Knows nothing of what they do."""

from __future__ import annotations

import os

from headtail.engines import ModelConfig

# How long an OpenMP thread that waits looks before it sleeps, in turns of some 12 ns. A step of a small model is thousands of
# operations of some 20 us, and waking a thread takes as long; endless looking made a shared 2-core machine ten times slower.
SPINS = "3000"


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


def precision(config: ModelConfig) -> str:
    """The weights' type where the config leaves it open: on a CPU bfloat16, on a GPU as they are stored."""
    return ("auto" if config.gpus else "bfloat16") if config.dtype == "auto" else config.dtype


def quiet_transformers() -> None:
    """transformers' bars and warnings off."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
