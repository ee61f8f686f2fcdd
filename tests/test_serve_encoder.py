"""An encoder or a seq2seq model as the realtime student: many callers share a pass, and each gets what precompute would have stored."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from headtail.adapters.storage import Storage, open_storage
from headtail.batch.job import answer_settings
from headtail.core.errors import ConfigError
from headtail.core.guardrails import GuardrailConfig
from headtail.core.keys import answer_key, fingerprint
from headtail.core.task import Task
from headtail.engines import ModelConfig
from headtail.engines.models import find_model, weights_digest
from headtail.stages import serve
from headtail.stages.serve.answerer import RealtimeReply
from headtail.stages.serve.realtime import Student
from test_engines_encoder import QUERIES, random_encoder
from test_engines_transformers import QUERY_ONLY, student
from test_engines_transformers import short as short
from test_serve import STUDENT, config, published
from test_serve_link import Pupil, ask, linked, listening, until
from timescale import limit

SIDE_INPUTS = {"businesses": ["pizza palace"]}


class Learner(NamedTuple):
    """A student with random weights that is no decoder. `side_inputs`: what its task has."""

    task: Task
    model: ModelConfig
    side_inputs: dict[str, list[str]]

    def start(self, root: str) -> Student:
        return Student(self.model, root, self.task, STUDENT, weights_digest(Path(self.model.model)))


@pytest.fixture(scope="module", params=["encoder", "seq2seq"])
def learner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, segmentation: Task, short: Task) -> Learner:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "encoder":
        random_encoder(folder, segmentation)
        return Learner(segmentation, ModelConfig(model=str(folder)), SIDE_INPUTS)
    student(folder, short, QUERY_ONLY, "seq2seq")
    return Learner(short, ModelConfig(model=str(folder), engine="transformers", dtype="float32", max_model_len=128), {})


def test_callers_share_a_pass_and_each_gets_its_own_answer(learner: Learner, root: str) -> None:
    task, given, served = learner.task, learner.side_inputs, learner.start(root)
    found = find_model(learner.model, open_storage(root))
    settings = fingerprint(answer_settings(task, learner.model, found.digest, found.io_format))
    passes: list[int] = []
    run = served._engine._all  # type: ignore[attr-defined]
    served._engine._all = lambda messages: passes.append(len(messages)) or run(messages)  # type: ignore[attr-defined, func-returns-value]

    async def answers(queries: list[str]) -> list[RealtimeReply]:
        return await asyncio.gather(*(served.answer(query, given) for query in queries))

    replies = asyncio.run(answers(QUERIES * 5))
    assert sum(passes) == 5 * len(QUERIES)
    assert len(passes) <= 3, "those that come during a pass share the next one"
    alone = {query: asyncio.run(answers([query]))[0].text for query in QUERIES}
    for query, reply in zip(QUERIES * 5, replies, strict=True):
        answer, problem = task.parse(reply.text)
        assert not problem
        assert reply.finish_reason == "stop"
        assert reply.text == alone[query]
        if task.name == "query_segmentation":  # a random model corrects nothing here: it knows no spellings
            assert all(piece["text"] in query for piece in answer["segments"])
        key = answer_key(found.io_format.messages(task, query, given), settings)
        assert reply.answer_key == key.hex()
    served.close()


def test_a_replica_with_other_weights_does_not_start(learner: Learner, root: str) -> None:
    with pytest.raises(ConfigError, match="a node has other weights than the job"):
        Student(learner.model, root, learner.task, "distill/x", "0" * 64)


def test_a_query_that_is_too_long_is_an_error_and_the_next_one_is_answered(
    learner: Learner, store: Storage, root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Callers choose how long a query is: one that is too long writes at most a line, with no stack trace."""
    served, long = learner.start(root), "a " * 180
    published(store, tmp_path, learner.task, ["pizza near me"])

    async def go() -> None:
        options: dict[str, Any] = {"max_query_chars": 400, "realtime_timeout_ms": int(1000 * limit(30))}
        async with (
            listening(store, tmp_path, **options) as (front, link, address),
            linked(Pupil(learner.task), [address], served.answer),
        ):
            await until(lambda: link.connections)
            capfd.readouterr()
            with caplog.at_level(logging.INFO):
                first, second, third = await asyncio.gather(*(ask(front, query) for query in ("pizza", long, "sushi")))
            assert (second.reason, second.degraded) == ("error", True)
            assert {first.reason, third.reason} == {""}

    asyncio.run(go())
    lines = [line for record in caplog.records if record.name.startswith("headtail") for line in caplog.handler.format(record).splitlines()]
    assert len(lines) <= 1, lines
    assert len("".join(capfd.readouterr()).splitlines()) <= 1
    with pytest.raises(Exception, match=r"at most 64 fit|must fit into max_model_len=128"):
        asyncio.run(served.answer(long, {}))
    served.close()


@pytest.mark.slow
def test_a_server_whose_student_is_no_decoder(cluster: None, store: Storage, root: str, tmp_path: Path, learner: Learner) -> None:
    unguarded = learner.task.file.model_copy(update={"guardrails": GuardrailConfig(enabled=False)})  # a random model says nonsense
    published(store, tmp_path, dataclasses.replace(learner.task, file=unguarded), ["pizza near me"])
    model = {**learner.model.model_dump(include={"model", "engine", "dtype", "max_model_len"}), "cpus": 0.5}
    with serve.start_server(config(root, model=model, realtime_timeout_ms=int(limit(30_000)))) as server:
        found = httpx.get(f"{server.url}/v1/answer", params={"query": "ramen near the stage"}, timeout=limit(60)).json()
        assert (found["source"], found["cached"]) == ("realtime_student", False), found
        assert httpx.get(f"{server.url}/v1/answer", params={"query": "pizza near me"}, timeout=limit(30)).json()["cached"]
