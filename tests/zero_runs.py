"""One rank of a training group without Ray: every ZeRO stage, broken off in the middle and gone on with. For test_distill_train.

In: a folder (model, examples), `stage:precision:lora:root` per run, as arguments; RANK and WORLD_SIZE in the environment. Out: rank 0
prints one JSON line per run: the history of a run that nothing stopped, and of one that was left without a word after a step
and begun anew from its last complete checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headtail.adapters.storage import open_storage, read_table
from headtail.engines.models import weights_digest
from headtail.stages.distill import Config, Lora, zero
from headtail.stages.distill.base import BaseModelConfig
from headtail.stages.distill.batches import example_columns
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.stage import Stopping
from headtail.stages.distill.train import Run, Spec, _model

STEPS, BROKEN_AFTER, EVERY = 9, 8, 3


class Left(BaseException):
    """The run is left as it is, as a killed process leaves it."""


@dataclass(frozen=True)
class Leaving(DecoderLearner):
    """Raises in the middle of a step."""

    after: int = 10**9

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        if engine.training and engine.global_steps >= self.after:
            raise Left
        return super().loss(engine, arrays)


class Meter:
    """Counts nothing."""

    class add:  # noqa: N801
        @staticmethod
        def remote(**amounts: Any) -> None: ...


def once(spec: Spec, rank: int, world: int) -> None:
    """As train.worker does it, without Ray."""
    import torch

    torch.manual_seed(spec.config.seed + 17 * rank)
    with tempfile.TemporaryDirectory() as scratch:
        engine = zero.start_engine(_model(spec, Path(scratch)), spec.config)
        table = read_table(spec.store, spec.examples)
        held = table["held_out"].to_numpy()
        try:
            Run(spec, engine, rank, world, example_columns(table.filter(~held)), example_columns(table.filter(held)), Path(scratch)).train()
        except Left:
            torch.distributed.barrier()


def main(folder: str, runs: list[str]) -> None:
    """All runs, one after another."""
    import os

    import torch

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for number, run in enumerate(runs):
        stage, precision, lora, root = run.split(":", 3)
        store = open_storage(root)
        config = Config(
            root=root,
            base=BaseModelConfig(model=f"{folder}/base"),
            lora=Lora(rank=4, dropout=0.2) if lora == "lora" else None,
            early_stopping=Stopping(every=2, patience=99),
            max_steps=STEPS,
            epochs=50,
            batch_rows=4,
            batch_tokens=300,
            precision=precision,
            zero_stage=int(stage),
            log_steps=4,
            checkpoint_steps=EVERY,
        )
        found = {}
        for name, after in (("whole", 10**9), ("broken", BROKEN_AFTER)):
            learner = Leaving(after=after)
            spec = Spec(store, f"run{number}/{name}", learner, (), 0, config, Meter(), weights_digest(Path(folder) / "base"))
            if rank == 0:
                store.replace(spec.examples, Path(f"{folder}/examples.parquet").read_bytes())
            torch.distributed.barrier()
            once(spec, rank, world)
            if name == "broken":
                assert not store.exists(spec.done)
                once(spec._replace(learner=replace(learner, after=10**9)), rank, world)
            if rank == 0:
                found[name] = json.loads(store.read(spec.done))
                found[name]["left"] = sorted(one.path for one in store.files(spec.work))
        if rank == 0:
            print(json.dumps({"run": run, **found}), flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
