"""How often the gates of the quickstart pass: its students for many seeds, in each precision.

    python -m tests.bench.seeds [--seeds 20] [--config jobs/configs/run_pipeline.laptop.yaml] [--set field=value] [--minutes 600]

A seed is other example data (log, people's answers), another sample for the teacher and other initial weights: nothing is taken from one
seed to the next. Each gate is the first look at the labels that the pipeline keeps for it: the precisions have a store each. Out:
build/bench/seeds.json, each criterion of each gate with its lower bound, how often it passed, and the least room it had. The stages are
the pipeline's, in one process without Ray: one rank takes the rows that two would take in a step, and the batch student answers people's
queries alone, which is what its gate looks at. A call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headtail import pipeline
from headtail.adapters import progress
from headtail.adapters.storage import open_storage
from headtail.batch import driver
from headtail.batch.worker import Worker
from headtail.core.config import load_config
from headtail.core.receipt import Receipt
from headtail.engines import Engine, ModelConfig, open_engine
from headtail.examples import example_data
from headtail.releases.seal import keep_for_gate
from headtail.stages import curate, distill, evaluate, gate, ingest, plan, precompute
from headtail.stages.distill import launch
from headtail.stages.distill.encoder import EncoderLearner

from .in_process import answer_shards, replace_attribute
from .machine import machine

CONFIG = Path("jobs/configs/run_pipeline.laptop.yaml")
OUT = Path("build/bench/seeds.json")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # of training, and of the engines


class Runner:
    """The pipeline's stages up to its gates, for one config and one store."""

    def __init__(self, config: pipeline.Config) -> None:
        self.config, self.store = config, open_storage(config.root)

    def run(self, stage: Any, config: Any, **changes: Any) -> Receipt[Any]:
        known = {"task": self.config.task, **changes}
        made: Receipt[Any] = stage(
            config.at(self.config, self.config.tracking, **{k: v for k, v in known.items() if k in type(config).model_fields})
        )
        return made

    def prepare(self) -> tuple[Receipt, Receipt, Receipt]:
        """(plan, the teacher's answers, the training set)"""
        c = self.config
        made = self.run(example_data.run, c.example_data)
        labels = self.store.uri(made.output(f"human_labels_{c.task}").path)
        log = self.run(ingest.run, c.ingest, log=self.store.uri(f"{made.path}/log"), labels=labels)
        planned = self.run(plan.run, c.plan, log=log.path)
        tables = tuple(f"{planned.path}:{name}" for name in ("head", "teacher_sample", "human_labels"))
        model = c.precompute_teacher.model.model_copy(update={"model": pipeline.SHIPPED_TEACHER})
        taught = self.run(precompute.run, c.precompute_teacher, inputs=tables, source="teacher", model=model)
        keep_for_gate(self.store, planned, c.labels_sealed_share)
        return planned, taught, self.run(curate.run, c.curate, answers=taught.path, labels=f"{planned.path}:human_labels")

    def judge(self, planned: Receipt, taught: Receipt, training_set: Receipt, precision: str) -> list[dict[str, Any]]:
        """Both students, and every criterion of their gates."""
        c, labels = self.config, f"{planned.path}:human_labels"
        assert c.distill_realtime is not None
        sets = (distill.TrainingSet(task=c.task, training_set=f"{training_set.path}:training_set"),)
        sources, made = {"teacher": taught.path}, {}
        second = pipeline._all_read(c.distill_realtime, planned)
        for source, how in (
            {"batch_student": second} if c.one_student else {"batch_student": c.distill_batch, "realtime_student": second}
        ).items():
            alone = {"workers": 1, "batch_rows": how.batch_rows * how.workers, "precision": precision}
            made[source] = self.run(distill.run, how.model_copy(update=alone), sets=sets, labels=(labels,))
            model = c.precompute_batch.model.model_copy(update={"model": made[source].path, "dtype": PRECISIONS[precision]})
            sources[source] = self.run(precompute.run, c.precompute_batch, inputs=(labels,), source=source, model=model).path
        scored = self.run(evaluate.run, c.evaluate, labels=labels, answers=sources)
        found = []
        for source, student in made.items():
            verdict = self.run(gate.run, c.gate, evaluation=scored.path, source=source, candidate=student.path)
            names = ("kind", "stratum", "n", "value", "lower_bound", "threshold", "passed")
            found += [
                {"source": source, **{name: getattr(criterion, name) for name in names}} for criterion in verdict.result.evidence.criteria
            ]
        return found


def seeded(config: Path, root: str, seed: int, teacher: str, sets: Sequence[str]) -> pipeline.Config:
    """The pipeline's config with a seed everywhere; `teacher` is the precision of its engine."""
    seeds = [f"{owner}.seed={seed}" for owner in ("example_data", "plan", "curate", "distill_batch", "distill_realtime")]
    dtype = f"precompute_teacher.model.dtype={PRECISIONS[teacher]}"
    return load_config(pipeline.Config, config, [*seeds, dtype, f"root={root}", "tracking.enabled=false", *sets])


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Training and batch inference in this process; one engine of the teacher's for each precision."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import torch
    from ray import train

    from headtail.batch import worker as working
    from headtail.stages.distill.train import train_worker as trains

    nobody = SimpleNamespace(add=SimpleNamespace(remote=lambda *_, **__: None))
    kept: dict[str, Engine] = {}

    def engine(model: ModelConfig, path: str, bound: Any, sampling: dict[str, Any], top: int) -> Engine:
        if model.engine != "vllm":
            return open_engine(model, path, bound, sampling, top)
        name = model.model_dump_json()
        if name not in kept:
            kept[name] = open_engine(model, path, bound, sampling, top)
        return kept[name]

    def spread(job: Any, manifest: Any, asks: Sequence[Any], *_: Any) -> list[dict[str, Any]]:
        return answer_shards(Worker(job, manifest, "run"), asks)

    bases: dict[Any, Any] = {}
    makes = EncoderLearner.make

    def make(self: EncoderLearner, shape: Any, texts: Any, seed: int) -> Any:
        """A base is the same in each precision: made once."""
        name = (shape, tuple(texts), seed)
        if name not in bases:
            bases.clear()
            bases[name] = makes(self, shape, name[1], seed)
        return copy.deepcopy(bases[name])

    EncoderLearner.make = make  # type: ignore[method-assign]
    replace_attribute(driver, "_spread", spread)
    replace_attribute(working, "open_engine", engine)
    replace_attribute(train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1))
    replace_attribute(launch, "train_student", _trains(trains, nobody))
    torch.set_num_threads(1)  # two that wait for one another by spinning take minutes on a machine that does other work too
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


def _trains(worker: Any, meter: Any) -> Any:
    from headtail.adapters.storage import read_json, write_table
    from headtail.stages.distill.train import Spec

    def here(config: Any, stage: Any, learner: Any, base: Any, examples: Any, *_: Any) -> dict[str, Any]:
        pad = int(base.tokenizer.pad_token_id)
        spec = Spec(stage.store, f"{stage.path}/work", learner, base.files, pad, config, meter)
        write_table(stage.store, spec.examples, examples)
        worker(spec)
        return dict(read_json(stage.store, spec.done))

    return here


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per precision and criterion: of how many runs it passed, and the least and the median distance of its bound to what is asked."""
    room: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    gates: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for run in runs:
        for criterion in run["criteria"]:
            name = f"{criterion['source']}: {criterion['kind']} {criterion['stratum']} {criterion['threshold']:g}"
            room[run["precision"], name].append((criterion["lower_bound"] - criterion["threshold"], criterion["passed"]))
        for source in dict.fromkeys(criterion["source"] for criterion in run["criteria"]):
            gates[run["precision"], f"{source}: gate"].append(all(c["passed"] for c in run["criteria"] if c["source"] == source))
    found: dict[str, Any] = {f"{p} {name}": {"runs": len(passed), "passed": sum(passed)} for (p, name), passed in gates.items()}
    for (precision, name), each in room.items():
        far = sorted(distance for distance, _ in each)
        line = {"runs": len(each), "passed": sum(passed for _, passed in each), "least_room": far[0], "median_room": far[len(far) // 2]}
        found[f"{precision} {name}"] = line
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.seeds", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], help="field=value of the pipeline, as for headtail pipeline")
    parser.add_argument("--minutes", type=float, default=600.0, help="no seed is begun later than this")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"runs": []}
    ends = time.monotonic() + 60 * asked.minutes
    progress.quiet()
    with without_ray():
        for seed in range(asked.seeds):
            if seed in {run["seed"] for run in found["runs"]} or time.monotonic() > ends:
                continue
            with tempfile.TemporaryDirectory(prefix="headtail-seeds-") as root:
                began = time.process_time()
                config = seeded(asked.config, f"{root}/both", seed, tuple(PRECISIONS)[seed % 2], asked.set)
                prepared = Runner(config).prepare()
                runs = []
                for precision in PRECISIONS:
                    own = shutil.copytree(f"{root}/both", f"{root}/{precision}")
                    runner = Runner(config.model_copy(update={"root": own}))
                    runs.append({"seed": seed, "precision": precision, "criteria": runner.judge(*prepared, precision)})
            found["runs"] += runs
            found |= {"summary": summary(found["runs"]), **machine()}
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"seed {seed}: {time.process_time() - began:.0f} CPU s", flush=True)
    print(json.dumps(found.get("summary"), indent=1))


if __name__ == "__main__":
    main()
