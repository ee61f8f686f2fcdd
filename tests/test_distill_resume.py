"""A run that did not end, and the next one: it goes on or begins anew, and says which; what a store gives it runs no code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headtail.adapters.storage import Storage, read_json, write_json
from headtail.core.config import result_fields
from headtail.core.errors import StorageError
from headtail.core.keys import sha256_file
from headtail.stages import distill
from headtail.stages.distill import checkpoints, launch, resume
from headtail.stages.distill.checkpoints import Checkpoints, random_state, tensors
from headtail.stages.distill.run_record import BestWeights, LoopRecord, LossPoint, TrainedRun, TrainingMakeup
from headtail.stages.distill.train import LoopState

MADE = {"zero_stage": 2, "precision": "fp32", "lora": {"rank": 16, "targets": "all-linear"}, "workers": 2, "data": "d"}
CONFIG = distill.Config()


def settings(**fields: Any) -> dict[str, Any]:
    config = distill.Config.model_validate({**CONFIG.model_dump(), **{name: value for name, value in fields.items() if name != "data"}})
    return {**result_fields(config), "data": fields.get("data", "d" * 64)}


def left(store: Storage, path: str, now: dict[str, Any], step: int = 40) -> None:
    write_json(store, f"{path}/{resume.SETTINGS}", now)
    write_json(store, f"{path}/{resume.MARKER}", {"tag": "step-1", "files": {}, "state": {"step": step}})


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"workers": 3}, "workers (2, now 3)"),
        ({"lora": {"rank": 8}}, "lora.rank (16, now 8)"),
        ({"lora": None}, "lora"),
        ({"zero_stage": 3}, "zero_stage (2, now 3)"),
        ({"data": "e" * 64}, "data"),
        ({"workers": 1, "seed": 3, "epochs": 9.0, "batch_rows": 8, "max_tokens": 99}, "and 1 more"),
    ],
)
def test_a_run_that_begins_anew_says_from_what_it_differs(store: Storage, fields: dict[str, Any], said: str) -> None:
    left(store, "distill/old", settings())
    (text,) = resume.earlier_run(store, "distill/new", settings(**fields))
    assert text.startswith("begins anew: distill/old, left after step 40, differs in ")
    assert said in text


def test_only_what_did_not_end_and_is_of_the_same_kind_is_named(store: Storage) -> None:
    now = settings(workers=3)
    assert resume.earlier_run(store, "distill/new", now) == []
    left(store, "distill/done", settings())
    write_json(store, "distill/done/receipt.json", {})
    left(store, "distill/other", settings(sets=[{"task": "query_intent"}]))
    assert resume.earlier_run(store, "distill/new", now) == []
    left(store, "distill/new", now, 7)
    assert resume.earlier_run(store, "distill/new", now) == ["goes on after step 7"]


def test_what_it_says_is_in_the_receipt_and_on_the_terminal(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    stage: Any = SimpleNamespace(store=store, path="distill/new", note=notes.append)
    left(store, "distill/old", settings())
    launch._begin(distill.Config(workers=3), stage, "d" * 64)
    assert notes == ["this run begins anew: distill/old, left after step 40, differs in workers (2, now 3)"]
    assert notes[0] in capsys.readouterr().err
    left(store, "distill/new", read_json(store, f"distill/new/{resume.SETTINGS}"), 60)
    launch._begin(distill.Config(workers=3), stage, "d" * 64)
    assert "this run goes on after step 60" in notes


class Engine:
    """Loads as DeepSpeed does: through its checkpoint engine."""

    def __init__(self) -> None:
        self.checkpoint_engine = SimpleNamespace(load=lambda path, map_location=None: pytest.fail("DeepSpeed's own load"))
        self.loaded: Any = None

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> None:
        self.loaded = self.checkpoint_engine.load(f"{folder}/{tag}/mp_rank_00_model_states.pt", map_location="cpu")


def saved(store: Storage, tmp_path: Path, model: Any, **marker: Any) -> None:
    """A complete checkpoint of one rank."""
    folder = "run/work/checkpoints/step-00000003"
    files = {}
    for name, value in (("mp_rank_00_model_states.pt", model), ("rank-00000.pt", {"rows": 3, "random": random_state()})):
        torch.save(value, tmp_path / name)
        files[f"{folder}/{name}"] = sha256_file(tmp_path / name)
        store.replace(f"{folder}/{name}", (tmp_path / name).read_bytes())
    plain = {"tag": "step-00000003", "files": files, "state": {"step": 3}, "made": MADE, **marker}
    store.replace("run/work/checkpoints/COMPLETE", json.dumps(plain).encode())


def opened(store: Storage, tmp_path: Path, **changes: Any) -> Checkpoints:
    return Checkpoints(store, "run/work", tmp_path / "scratch", 0, 1, False, TrainingMakeup.model_validate({**MADE, **changes}))


def test_the_same_run_goes_on(store: Storage, tmp_path: Path) -> None:
    saved(store, tmp_path, {"module": {"w": torch.ones(2)}})
    engine = Engine()
    assert opened(store, tmp_path).load(engine) == (LoopRecord(step=3), {"rows": 3})
    assert engine.loaded["module"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "change", [{"workers": 3}, {"zero_stage": 3}, {"lora": {"rank": 8}}, {"lora": None}, {"precision": "bf16"}, {"data": "e"}]
)
def test_a_checkpoint_of_something_else_is_not_loaded(store: Storage, tmp_path: Path, change: dict[str, Any]) -> None:
    saved(store, tmp_path, {"module": {}})
    engine = Engine()
    assert opened(store, tmp_path, **change).load(engine) is None
    assert engine.loaded is None


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.flag,)


def test_a_checkpoint_runs_no_code_though_its_digests_are_right(store: Storage, tmp_path: Path) -> None:
    """Who can write the store can write both the file and the marker that holds its digest."""
    flag = tmp_path / "ran"
    saved(store, tmp_path, {"module": {}, "x": Planted(flag)})
    with pytest.raises(StorageError, match="more than tensors and plain values"):
        opened(store, tmp_path).load(Engine())
    assert not flag.exists()


@pytest.mark.parametrize("path", ["run/work/other.pt", "/etc/passwd", "run/work/checkpoints/step-00000003/../../x", "../x"])
def test_a_checkpoint_names_no_file_outside_its_folder(store: Storage, tmp_path: Path, path: str) -> None:
    saved(store, tmp_path, {}, files={path: "0" * 64})
    with pytest.raises(StorageError, match="outside its folder"):
        opened(store, tmp_path).load(Engine())


def test_deepspeeds_own_values_pass(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = {"stage": ZeroStageEnum(2), "scaler": LossScaler(1.0), "place": fragment_address(3, 0), "names": {"a"}, "w": torch.zeros(1)}
    torch.save(plain, tmp_path / "x.pt")
    found = tensors(str(tmp_path / "x.pt"), map_location="cpu")
    assert found["stage"] == 2
    assert (found["scaler"].cur_scale, found["place"].numel, found["names"]) == (1.0, 3, {"a"})
    assert checkpoints.tensors is tensors


def test_a_record_of_the_loop_comes_back_as_it_was() -> None:
    """Through JSON, with a loss that is no number: held-out rows that there are none of."""
    best = BestWeights(step=2, eval_loss=0.5, files=("run/best/a.safetensors",))
    history = [LossPoint(step=2.0, loss=0.25, eval_loss=float("nan"), seconds=1.5)]
    state = LoopState(3, history, [torch.tensor(0.125), 0.5], best, 1, 0.0)
    record = state.record(2.0)
    again = LoopRecord.model_validate(json.loads(json.dumps(record.model_dump(mode="json"))))
    assert math.isnan(again.history[0].eval_loss)
    assert repr(again) == repr(record)
    resumed = LoopState.resume(again)
    assert (resumed.step, resumed.losses, resumed.best, resumed.patience, resumed.seconds) == (3, [0.125, 0.5], best, 1, 2.0)


def test_the_weights_taken_have_a_point_of_the_curve() -> None:
    points = [LossPoint(step=float(step), loss=1.0 / step, eval_loss=1.0, seconds=float(step)) for step in (2, 4, 6)]
    fields = {"history": points, "files": ("a/b",), "steps": 6, "real_tokens": 1, "tokens": 2, "rows": 3}
    assert TrainedRun(taken_step=4, **fields).final_point == points[1]
    assert TrainedRun(taken_step=5, **fields).final_point == points[2]
    with pytest.raises(ValidationError, match="history"):
        TrainedRun(taken_step=4, **{**fields, "history": ()})
    with pytest.raises(ValidationError, match="taken"):
        TrainedRun.model_validate({**fields, "takenstep": 4})
