"""Training that survives: broken off at any step, a run goes on from its last complete checkpoint and makes the same steps."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headtail.adapters.storage import Storage
from headtail.core.config import TrackingConfig
from headtail.core.errors import StorageError
from headtail.core.receipt import Receipt
from headtail.core.task import Task
from headtail.examples import example_data
from headtail.stages.distill import launch
from headtail.stages.distill import stage as distill
from headtail.stages.distill.base import BaseModelConfig, Shape, make_decoder_base
from headtail.stages.distill.checkpoints import Checkpoints
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.tokenizer import train_tokenizer
from here import fit_here, unmetered
from ports import free_port
from timescale import limit

TINY = Shape(vocabulary=400, hidden=32, layers=2, heads=2, feed_forward=64, positions=256)
OFF = TrackingConfig(enabled=False)


@dataclass(frozen=True)
class Dying(DecoderLearner):
    """One worker kills itself, once, in the middle of a step: no handler runs, nothing is written."""

    flag: str = ""
    step: int = 0

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        if engine.training and engine.global_steps == self.step and not os.path.exists(self.flag):
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:  # the other worker was first
                return super().loss(engine, arrays)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(engine, arrays)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that draws random numbers at every step: what is not in a checkpoint shows in the curve."""
    folder = tmp_path_factory.mktemp("model") / "base"
    found = (found for _, found, _ in example_data.sample(example_data.Config(seed=5), 300, "train/x"))
    tokenizer = train_tokenizer(
        (text for m in found for text in (m.text, json.dumps(example_data.right_answers(m)["query_segmentation"]))), 400
    )
    model = make_decoder_base(TINY, tokenizer, 0)
    model.config.attention_dropout = 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Receipt]:
    root = str(tmp_path_factory.mktemp("rows") / "store")
    return root, example_data.run(example_data.Config(root=root, tracking=OFF, events=500, days=2, train=160, labels=40, seed=3))


def curve(root: str, receipt: Receipt) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads((Path(root) / receipt.output("history").path).read_text())
    return history


def same_curve(one: list[dict[str, float]], other: list[dict[str, float]], within: float) -> None:
    assert [p["step"] for p in one] == [p["step"] for p in other]
    for name in ("loss", "eval_loss"):
        assert [p[name] for p in one] == pytest.approx([p[name] for p in other], abs=within, rel=0)


def test_a_checkpoint_without_its_marker_does_not_exist(store: Storage, tmp_path: Path) -> None:
    store.replace("w/checkpoints/step-00000003/mp_rank_00_model_states.pt", b"half of it")
    assert Checkpoints(store, "w", tmp_path, rank=0, world=1, frozen=False).load(None) is None


def test_a_damaged_checkpoint_is_refused(store: Storage, tmp_path: Path) -> None:
    path = "w/checkpoints/step-00000003/mp_rank_00_model_states.pt"
    store.replace(path, b"the weights, one bit off")
    marker = {"tag": "step-00000003", "world": 1, "files": {path: "0" * 64}, "state": {"step": 3}}
    store.replace("w/checkpoints/COMPLETE", json.dumps(marker).encode())
    with pytest.raises(StorageError, match="not the one that was written"):
        Checkpoints(store, "w", tmp_path, rank=0, world=1, frozen=False).load(None)


def test_a_rank_reads_its_own_parts_and_what_all_share(store: Storage, tmp_path: Path) -> None:
    names = ["mp_rank_00_model_states.pt", "rank-00000.pt", "rank-00001.pt"]
    names += [f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for kind in ("", "bf16_") for rank in (0, 1, 11)]
    mine = [name for name in names if Checkpoints(store, "w", tmp_path, rank=1, world=12, frozen=False).needs(name)]
    shared, own = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert mine == [shared, "rank-00001.pt", own, f"bf16_{own}"]


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(base: Path, rows: tuple[str, Receipt], cluster: None, tmp_path: Path, monkeypatch: Any) -> None:
    """kill -9 of a Ray Train worker at a random step: same loss curve (1e-6, fp32), same weights, as a run that nothing befell.

    That one is of two ranks without Ray: it takes half the time.
    """
    seed = random.randrange(10**6)
    step = random.Random(seed).randrange(4, 13)
    print(f"seed {seed}: a worker dies in step {step}")
    made = {}
    for name in ("whole", "killed"):
        root = str(tmp_path / name)
        shutil.copytree(rows[0], root)
        flag = tmp_path / f"{name}.died"
        learner = Dying(flag=str(flag), step=step if name == "killed" else -1)
        monkeypatch.setattr(distill, "learner_for", lambda *args, learner=learner, **settings: learner)
        config = distill.Config(
            root=root,
            tracking=OFF,
            sets=(distill.TrainingSet(training_set=f"{rows[1].path}:train_query_segmentation"),),
            labels=(),
            base=BaseModelConfig(model=str(base)),
            lora=distill.Lora(rank=4, dropout=0.2),
            precision="fp32",
            epochs=3,
            max_steps=14,
            batch_rows=8,
            held_out_share=0.2,
            log_steps=1,
            checkpoint_steps=3,
        )
        with monkeypatch.context() as patch:
            if name == "whole":
                patch.setattr(launch, "_fit", fit_here(2))
                patch.setattr("headtail.adapters.meter.job_meter", unmetered)
            made[name] = (root, distill.run(config))
        assert flag.exists() == (name == "killed")
    one, other = (curve(*made[name]) for name in ("whole", "killed"))
    assert len(one) == 14
    same_curve(one, other, 1e-6)
    digests = [receipt.result.digest for _, receipt in made.values()]
    assert digests[0] == digests[1]
    assert made["whole"][1].metrics["real_token_share"] == made["killed"][1].metrics["real_token_share"]


def examples(base: Path, rows: tuple[str, Receipt], segmentation: Task) -> pa.Table:
    from headtail.adapters.storage import open_storage
    from headtail.adapters.storage.receipts import load_ref
    from headtail.stages.distill.rows import Rows, TrainingSet, Weights, read_rows
    from headtail.stages.distill.rows import examples as made_of

    learner, store = DecoderLearner(), open_storage(rows[0])
    ref = f"{rows[1].path}:train_query_segmentation"
    read = read_rows(store, Weights(), TrainingSet(training_set=ref), segmentation, {"training_set.0": load_ref(store, ref)}, 0)
    part = Rows(read.training_set.slice(0, 60), read.held_out)
    return made_of(learner, learner.load(str(base))[1], [part], [segmentation], 400, 0.2)


@pytest.fixture
def broken_off(base: Path, rows: tuple[str, Receipt], segmentation: Task, tmp_path: Path) -> Any:
    """Runs of zero_runs on two ranks, by their argument."""
    shutil.copytree(base, tmp_path / "base")
    pq.write_table(examples(base, rows, segmentation), tmp_path / "examples.parquet")

    def start(*runs: str) -> dict[str, dict[str, Any]]:
        port = free_port()
        ranks = []
        for rank in range(2):
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            env = {**os.environ, **places, "RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
            env["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "compiled")
            command = [sys.executable, str(Path(__file__).parent / "zero_runs.py"), str(tmp_path), *runs]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        ends = [process.communicate(timeout=limit(200)) for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], ends[0][1][-3000:] + ends[1][1][-3000:]
        assert not (tmp_path / "compiled").exists(), "an op was built with g++, a minute for what training on a CPU never calls"
        found = [json.loads(line) for line in ends[0][0].splitlines() if line.startswith("{")]
        return {one["run"]: one for one in found}

    return start


@pytest.mark.slow
def test_every_zero_stage_goes_on_where_it_was(broken_off: Any, s3_root: str, tmp_path: Path) -> None:
    """ZeRO 0 to 3, whole models and adapters, fp32 and bf16, on disk and on S3, with early stopping's best weights at stake."""
    local = str(tmp_path / "store")
    runs = [f"0:fp32:full:{local}", f"1:fp32:lora:{local}", f"2:fp32:full:{s3_root}", f"2:bf16:lora:{local}", f"3:fp32:lora:{local}"]
    started = time.monotonic()
    found = broken_off(*runs, f"3:fp32:full:{s3_root}")
    print(f"{len(found)} pairs of runs in {time.monotonic() - started:.0f} s")
    for run in runs:
        whole, broken = found[run]["whole"], found[run]["broken"]
        same_curve(whole["history"], broken["history"], 1e-6 if ":fp32:" in run else 2e-2)
        assert whole["taken_step"] == broken["taken_step"]
        assert (whole["real_tokens"], whole["tokens"], whole["rows"]) == (broken["real_tokens"], broken["tokens"], broken["rows"])
        tags = {Path(path).parts[3] for path in broken["left"] if "/checkpoints/" in path}
        assert tags == {"COMPLETE", "step-00000006"}, "one checkpoint stays: the last complete one"
    starts = [found[run]["whole"]["history"][0]["loss"] for run in found if ":fp32:full:" in run]
    assert max(starts) - min(starts) < 1e-4, "the stage changes where things are kept, not what is learnt"
