"""An encoder as the realtime student: many callers share a pass, and each gets what precompute would have stored."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

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
from test_serve import config, published
from timescale import limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, segmentation: Task) -> Path:
    return random_encoder(tmp_path_factory.mktemp("encoder"), segmentation)


def test_callers_share_a_pass_and_each_gets_its_own_answer(folder: Path, root: str, segmentation: Task) -> None:
    model = ModelConfig(model=str(folder))
    student = Student(model, root, segmentation, "distill/x", weights_digest(folder))
    found = find_model(model, open_storage(root))
    settings = fingerprint(answer_settings(segmentation, model, found.digest, found.io_format))

    async def ask() -> list[RealtimeReply]:
        return await asyncio.gather(*(student.answer(q, {"businesses": ["pizza palace"]}) for q in QUERIES * 5))

    replies = asyncio.run(ask())
    for query, reply in zip(QUERIES * 5, replies, strict=True):
        answer, problem = segmentation.parse(reply.text)
        assert not problem
        assert reply.finish_reason == "stop"
        assert all(piece["text"] in query for piece in answer["segments"])  # a random model corrects nothing here: it knows no spellings
        key = answer_key(found.io_format.messages(segmentation, query, {"businesses": ["pizza palace"]}), settings)
        assert reply.answer_key == key.hex()


def test_a_replica_with_other_weights_does_not_start(folder: Path, root: str, segmentation: Task) -> None:
    with pytest.raises(ConfigError, match="a node has other weights than the job"):
        Student(ModelConfig(model=str(folder)), root, segmentation, "distill/x", "0" * 64)


def test_a_query_that_is_too_long_is_an_error_and_the_next_one_is_answered(folder: Path, root: str, segmentation: Task) -> None:
    student = Student(ModelConfig(model=str(folder)), root, segmentation, "distill/x", weights_digest(folder))

    async def ask() -> list[object]:
        return await asyncio.gather(*(student.answer(q, {}) for q in ("pizza", "a " * 90, "sushi")), return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert "at most 64 fit" in str(second)
    assert not isinstance(first, Exception)
    assert not isinstance(third, Exception)


@pytest.mark.slow
def test_a_server_whose_student_is_an_encoder(
    cluster: None, store: Storage, root: str, tmp_path: Path, folder: Path, segmentation: Task
) -> None:
    unguarded = segmentation.file.model_copy(update={"guardrails": GuardrailConfig(enabled=False)})  # a random model says nonsense
    published(store, tmp_path, dataclasses.replace(segmentation, file=unguarded))
    with serve.start_server(config(root, model={"model": str(folder), "cpus": 0.5}, realtime_timeout_ms=int(limit(30_000)))) as server:
        found = httpx.get(f"{server.url}/v1/answer", params={"query": "ramen near the stage"}, timeout=limit(60)).json()
        assert (found["source"], found["cached"]) == ("realtime_student", False), found
        assert httpx.get(f"{server.url}/v1/answer", params={"query": "pizza near me"}, timeout=limit(30)).json()["cached"]
