"""Students with prompt `query_only` and output `compact`, on real engines: random weights, then one that has learnt something."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from conftest import keep
from headtail.adapters.storage import Storage
from headtail.batch import read_answers
from headtail.core import io_format
from headtail.core.config import TrackingConfig
from headtail.core.io_format import IOFormat
from headtail.core.keys import normalise, query_key
from headtail.core.rows import HUMAN_LABELS, State
from headtail.core.task import Task, load_task
from headtail.engines import ModelConfig
from headtail.engines.models import find_model, weights_digest
from headtail.examples import example_data
from headtail.stages import distill, evaluate, precompute
from headtail.stages.distill.base import BaseModelConfig, Shape, make_decoder_base
from headtail.stages.distill.tokenizer import train_tokenizer
from headtail.stages.serve.realtime import Student
from null_jobs import MakeJob, planned, rows_of, run_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning"),  # xgrammar to vLLM, in its threads
]
OFF = TrackingConfig(enabled=False)
QUERY_ONLY = IOFormat(prompt="query_only", output="compact")
ENGINES = (pytest.param("vllm", marks=pytest.mark.vllm), "transformers")
TINY = Shape(vocabulary=600, hidden=64, layers=2, heads=2, feed_forward=128, positions=256)
ANSWER = {
    "name": {"type": "string", "maxLength": 6},
    "kind": {"enum": ["a", "b", "c"]},
    "open": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
    "score": {"anyOf": [{"type": "null"}, {"enum": [1, 2.5]}]},
    "note": {"type": "string", "maxLength": 4},
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task with one of everything; every answer ends within 96 tokens of one byte each."""
    folder = tmp_path_factory.mktemp("made_up")
    plain = {
        "name": "made_up",
        "answer": {"type": "object", "properties": ANSWER, "required": ["name", "kind", "tags", "score"], "additionalProperties": False},
        "sampling": {"max_tokens": 96, "temperature": 1.0},
        "score": {"kind": "exact"},
        "fallback": {"name": "x", "kind": "a", "tags": [], "score": None},
    }
    (folder / "task.yaml").write_text(json.dumps(plain))
    (folder / "prompt.j2").write_text("{% block user %}{{ query }}{% endblock %}")
    return load_task(folder)


@pytest.fixture(scope="module")
def random_student(made_up: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with an I/O format: whatever it says, it says at random."""
    import torch

    folder = tmp_path_factory.mktemp("batch_student")
    made = io_format.format_for(made_up, QUERY_ONLY)
    tokenizer = train_tokenizer(["pizza near me", "cheap noodles", "thai food in boston", "a|b~c^d\n"], 300)
    tokenizer.chat_template = made.chat_template
    make_decoder_base(TINY.model_copy(update={"vocabulary": 300}), tokenizer, 0).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    io_format.write_format(made, folder)
    return folder


def _model(path: Path | str, engine: Any = "vllm") -> ModelConfig:
    return ModelConfig(model=str(path), engine=engine, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.1, cpus=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_the_grammar_lets_a_student_say_is_an_answer(
    make_local_job: MakeJob, made_up: Task, random_student: Path, store: Storage, engine: str
) -> None:
    """300 rows of noise through worker, engine and xgrammar: each ends as a valid answer, spelled by its tokens, with a confidence."""
    model, queries = _model(random_student, engine), [f"pizza {i} near me" for i in range(300)]
    found = find_model(model, store)
    job = make_local_job(
        planned(queries),
        task=made_up,
        model=model,
        digest=found.digest,
        name=found.name,
        io_format=found.io_format.check(made_up),
        source="batch_student",
    )
    ledger, _ = run_here(job)
    rows = rows_of(job, ledger).to_pylist()
    assert ledger.states[State.ANSWERED] == 300, [row["raw"] for row in rows if row["raw"]][:3]
    assert len({row["answer"] for row in rows}) > 250
    for row in rows:
        answer, problem = made_up.parse(row["answer"])
        assert not problem
        assert 0 < row["confidence"] <= 1  # None, had the tokens not spelled the answer
        assert row["tokens_in"] <= len(row["query"]) + 1  # the query alone and a line's end, at most a byte each
        assert len(row["logprobs"]) == row["tokens_out"] <= len(job.io_format.target(made_up, answer).encode()) + 1


@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")  # vLLM leaves its sockets' context to the collector
@pytest.mark.parametrize("engine", ENGINES)
def test_the_realtime_student_says_what_the_batch_student_says(
    made_up: Task, random_student: Path, root: str, store: Storage, engine: str
) -> None:
    """In JSON, under the same key."""
    from headtail.batch.job import answer_settings
    from headtail.core.keys import answer_key, fingerprint

    async def ask() -> list[Any]:
        student = Student(model, root, made_up, "stand", weights_digest(random_student))
        try:
            return await asyncio.gather(*(student.answer(f"pizza {i}", {}) for i in range(20)))
        finally:
            student.close()
            del student
            gc.collect()  # here, not in the next test

    model = _model(random_student, engine)
    replies = asyncio.run(ask())
    found = find_model(model, store)
    settings = fingerprint(answer_settings(made_up, model, found.digest, found.io_format))
    for i, reply in enumerate(replies):
        assert made_up.parse(reply.text)[1] == ""
        assert reply.finish_reason == "stop"
        assert 0 < reply.confidence <= 1
        assert reply.answer_key == answer_key([{"role": "user", "content": f"pizza {i}"}], settings).hex()


@pytest.mark.vllm
def test_a_query_only_compact_student_is_distilled_asked_and_scored(train_here: None, answer_here: None, root: str, store: Storage) -> None:
    """example data -> distill -> precompute -> evaluate, all as users run it. It reads and writes a fraction of the teacher's tokens."""
    task, config = (
        load_task("query_intent"),
        example_data.Config(root=root, tracking=OFF, events=500, days=2, train=1500, labels=80, seed=3),
    )
    rows = example_data.run(config)
    labels = [
        (normalise(text), task.dump(example_data.right_answers(found)[task.name]))
        for text, found, _ in example_data.sample(config, 80, example_data.LABELS_SALT)
    ]
    table = [(query_key(query), query, answer, 1, "tail", "unknown", None) for query, answer in dict(labels).items()]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*table, strict=True), HUMAN_LABELS, strict=True)]
    keep(store, "plan", "ab12", {"human_labels": pa.table(columns, schema=HUMAN_LABELS)})
    sets = (distill.TrainingSet(task=task.name, training_set=f"{rows.path}:train_query_intent"),)
    student = distill.run(
        distill.Config(
            root=root, tracking=OFF, sets=sets, base=BaseModelConfig(shape=TINY), lora=None, io_format=QUERY_ONLY, near_labels=None,
            epochs=6, batch_rows=32, workers=1,
            learning_rate=5e-3, precision="fp32", zero_stage=0,
        )
    )  # fmt: skip
    assert f"model/{io_format.FILE}" in student.outputs
    done = precompute.run(
        precompute.Config(
            root=root, tracking=OFF, task=task.name, inputs=("plan:human_labels",), source="batch_student", model=_model(student.path)
        )
    )
    assert done.rows["answered"] == len(table)
    assert done.metrics["tokens_out_per_row"] == 2  # the sign of an option, and the end
    assert done.metrics["tokens_in_per_row"] < 14  # the query alone by a tokenizer of 600 tokens
    assert done.result.engine["structured_outputs"] == "xgrammar, compact"
    (given,) = read_answers(store, done, ["query", "answer", "raw", "confidence"])
    assert all(task.parse(row["answer"])[1] == "" and row["raw"] is None and 0 < row["confidence"] <= 1 for row in given.to_pylist())
    scored = evaluate.run(evaluate.Config(root=root, tracking=OFF, task=task.name, answers={"batch_student": done.path}, resamples=200))
    assert scored.metrics["quality/batch_student/all"] > 0.5  # eight labels: chance is far below
