"""Device, threads and precision of models that run in this process through torch itself. Knows nothing of what they do."""

from __future__ import annotations

import os

from headtail.engines import ModelConfig

SPINS = "3000"  # see engines.vllm.SPINS: endless looking for work makes a shared machine ten times slower


def set_environment(config: ModelConfig) -> None:
    """What must be in the environment before torch is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not config.gpus:
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(config.cpus)))  # Ray would set this to 1
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def precision(config: ModelConfig) -> str:
    """The weights' type where the config leaves it open: on a CPU bfloat16, as vLLM is run, on a GPU as they are stored."""
    return ("auto" if config.gpus else "bfloat16") if config.dtype == "auto" else config.dtype
