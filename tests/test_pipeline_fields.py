"""Every field of every group of a pipeline reaches the stage that it is for, or is refused: none is accepted and overwritten."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from headtail import pipeline
from headtail.adapters.storage import open_storage
from headtail.core.config import StageConfig, build_config
from headtail.core.errors import ConfigError
from headtail.core.evidence import read_evidence
from headtail.core.receipt import FileRef, Receipt, StageResult
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.releases import registry
from headtail.stages import publish, replay, serve
from headtail.stages.distill import Config as DistillConfig
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.gate.result import Result as GateResult
from headtail.stages.publish.result import Result as PublishResult
from test_evidence import evidence

NUMBERS = (0, 1, 2, 3, 17, 100, 100_000, 0.25, 0.5, 0.75, 2.5, 900.0)
TEXTS = ("x", "label", "http://127.0.0.1:9", "a/b", ("x",), ("failed",), ("failed", "truncated"))
VALUES: tuple[Any, ...] = (True, False, *NUMBERS, *TEXTS, {"x": 1.0}, {"x": "latest"}, {}, None)
SHARED = {*StageConfig.model_fields, "task"}
# Stages that a group's config goes to, where they have other names than the group.
STAGES = {
    "example_data": ("example-data",),
    "precompute_batch": ("precompute_batch", "precompute_realtime"),
    "evaluate": ("evaluate_teacher", "evaluate"),
    "gate": ("gate_batch", "gate_realtime"),
    "publish": ("publish_head", "publish"),
}
ENCODER: dict[str, Any] = {"student": "encoder", "base": {"shape": {}}, "lora": None}
# What else is set: each makes the pipeline treat some field in another way.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "plan": [{}, {"replay_holdout": False}],
    "serve": [{}, {"serve": {"escalation": {"model": {"model": "a/b", "usd_per_hour": 1.0}}}}],
    "distill_realtime": [{}, {"distill_realtime": {"io_format": {"side_inputs": True}}}],
    "distill_batch": [{}, {"distill_batch": {"base": {"model": "teacher"}}}],
    "precompute_batch": [{}, {"distill_batch": {"two_stage": True}}, {"distill_realtime": None}],
}
# Fields whose values depend on one another, so that none of VALUES fits alone.
ALONE = {"base.model", "base.shape", "logits", "escalation.model", "shadow.model"}
# Values that stand for what the pipeline finds: they are words of its own, not what a stage is given.
KEYWORDS = {("precompute_teacher", "model.model", "placeholder"), ("distill_batch", "base.model", "teacher")}


def leaves(kind: type[BaseModel], default: BaseModel | None, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, annotation, default) of every field that holds no further fields."""
    for name, field in kind.model_fields.items():
        value = getattr(default, name) if default is not None else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            yield from leaves(type(value), value, (*at, name))
        elif at or name not in SHARED:
            yield (*at, name), field.annotation, value


def choices(annotation: Any) -> Iterator[Any]:
    """The values of a Literal, however deep."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from choices(part)


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if path[1:] else value}


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: merged(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }
    return {**one, **both}


def at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


class Watched(pipeline._Pipeline):
    """A pipeline whose stages do nothing; `configs`: what each was given."""

    def __init__(self, config: pipeline.Config, task: Task) -> None:
        tracker: Any = SimpleNamespace()
        super().__init__(config, task, tracker, "")
        self.configs: dict[str, Any] = {}

    def stage(self, name: str, run: Any, config: StageConfig, **filled: Any) -> Any:
        self.configs[name] = config.at(self.config, self.tracking, **filled)
        kind = name.split("_")[0]
        self.receipts[name] = made = receipt(kind, f"{len(self.receipts):016x}", result_of(kind))
        return made


def receipt(kind: str, mark: str, result: StageResult) -> Receipt[Any]:
    path = f"{kind}/{mark}"
    names = ("human_labels", "human_labels_train", "log", "human_labels_query_intent")
    outputs = {name: FileRef(path=f"{path}/{name}.parquet", bytes=1, sha256="0" * 64, rows=9) for name in names}
    return Receipt(stage=kind, fingerprint=mark, path=path, started="", seconds=0, outputs=outputs, result=result)


def result_of(kind: str) -> StageResult:
    if kind == "distill":
        return DistillResult(digest="d")
    if kind == "gate":
        return GateResult(passed=True, evidence=read_evidence(evidence()), candidate_number=1)
    if kind == "publish":
        return PublishResult(snapshot="s", release="r", previous="", student="", figures={})
    return StageResult()


@pytest.fixture
def watched(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What each stage is given by a pipeline of some fields; ConfigError when they are refused."""
    own = tmp_path / "query_intent"
    shutil.copytree(EXAMPLES / "query_intent", own)
    tasks = {name: load_task(name) for name in (str(own), "query_intent")}
    monkeypatch.setattr(pipeline, "say", lambda _: None)
    monkeypatch.setattr("headtail.releases.seal.say", lambda _: None)
    monkeypatch.setattr(registry, "register_student", lambda *_, **__: None)

    def run(fields: Mapping[str, Any], example: bool) -> tuple[pipeline.Config, dict[str, Any]]:
        own_data: dict[str, Any] = {} if example else {"log": "log.csv", "labels": "labels.csv"}
        shared = {"root": root, "task": "query_intent" if example else str(own), **own_data}
        config = build_config(pipeline.Config, merged({**shared, "distill_realtime": ENCODER}, fields), "test")
        found = Watched(config, tasks[config.task])
        monkeypatch.setattr(replay, "find_replay", lambda config, task: None)
        monkeypatch.setattr(
            serve,
            "start_server",
            lambda config: found.configs.update(serve=config) or nullcontext(SimpleNamespace(url="http://127.0.0.1:9")),
        )
        pipeline._stages(found)
        return config, found.configs

    return run


GROUPS = {name: field.default for name, field in pipeline.Config.model_fields.items() if isinstance(field.default, StageConfig)}
GROUPS["distill_realtime"] = DistillConfig.model_validate(ENCODER)


@pytest.mark.parametrize("group", GROUPS)
def test_a_field_that_is_set_reaches_its_stage_or_is_refused(watched: Any, group: str) -> None:
    """Each field, at its default named outright and at another value."""
    lost, untried, tried = [], [], 0
    for path, annotation, default in leaves(type(GROUPS[group]), GROUPS[group]):
        others = 0
        for more, value in itertools.product(SETTINGS.get(group, [{}]), (default, *choices(annotation), *VALUES)):
            if (value == default and value is not default) or (value != default and others > len(SETTINGS.get(group, [{}]))):
                continue
            fields = merged(more, {group: nested(path, value)})
            try:
                config, configs = watched(fields, group == "example_data")
            except (ConfigError, ValidationError) as error:
                others += "fills in" in str(error)
                continue
            others += value != default
            tried += 1
            wanted = at(getattr(config, group), path)
            stages = [name for name in STAGES.get(group, (group,)) if name in configs]
            given = [at(configs[name], path) for name in stages]
            if (not stages or any(one != wanted for one in given)) and (group, ".".join(path), str(value)) not in KEYWORDS:
                lost.append((more, path, value, given))
        if not others:
            untried.append(".".join(path))
    assert not lost
    assert set(untried) <= ALONE
    assert tried > 3 or group == "calibrate"


def test_the_head_alone_is_published_only_where_nothing_is_current(watched: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "publish_head" in watched({}, example=True)[1]
    open_storage(root).replace("CURRENT", b"0123456789abcdef")
    known: list[Any] = []

    def find(config: Any, task: Task) -> Any:
        known.append(config.answers)
        return None

    monkeypatch.setattr(publish, "find_publish", find)
    configs = watched({}, example=True)[1]
    assert "publish_head" not in configs
    assert "publish" in configs
    assert [len(answers) for answers in known] == [1]  # what was made of these answers before is looked for, not made


def test_what_another_field_overwrites_is_refused(watched: Any) -> None:
    with pytest.raises(ConfigError, match="two_stage answers without side inputs") as error:
        watched({"distill_batch": {"two_stage": True}, "precompute_batch": {"side_inputs": True}}, False)
    assert error.value.where == "precompute_batch.side_inputs"
    _, configs = watched({"distill_batch": {"two_stage": True}}, False)
    assert (configs["precompute_batch"].side_inputs, configs["precompute_realtime"].side_inputs) == (False, True)
    with pytest.raises(ConfigError, match="the teacher's revision"):
        watched({"distill_batch": {"base": {"model": "teacher", "revision": "abc"}}}, False)
    with pytest.raises(ConfigError, match="no log"):
        watched({"labels": "labels.csv"}, True)
