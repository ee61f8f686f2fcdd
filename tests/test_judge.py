"""The judge: asked by precompute over real HTTP, measured by people's labels, read by the gate; biases that were planted are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import cohen_kappa_score

from bench.judges import planted
from conftest import answered_by, keep
from headtail.adapters.storage import Storage, read_text
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS, KEY
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.stages import evaluate, gate, judge
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.judge.calibration import JudgeFigure, JudgeRows, judge_figures, kappa_figure, mean_figure
from headtail.stages.judge.family import model_family
from headtail.stages.judge.questions import draw_rows
from headtail.stages.judge.rubric import load_rubric
from test_engines_openai import Server, chat
from test_gate import with_policy

pytestmark = pytest.mark.usefixtures("not_drawn")

OFF = TrackingConfig(enabled=False)
RIGHT, WRONG = {"intent": "price"}, {"intent": "how_to"}
SHOP = "p" * 16
NONE = pa.array([], KEY)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("headtail.engines.openai.BACKOFF_S", 0.01)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def answers(store: Storage, task: Task, mark: str, given: dict[str, Any], name: str, source: str = "teacher") -> Receipt[Any]:
    """A precompute of these answers by query; None: not answered."""
    lines: list[dict[str, Any]] = [
        {"query_key": query_key(q), "query": q, "answer_key": query_key(mark + q), "stratum": "tail", "count": 3, "source": source}
        | {"state": "answered" if answer else "invalid", "answer": canonical(answer) if answer else None}
        for q, answer in given.items()
    ]
    table = pa.Table.from_pylist(sorted(lines, key=lambda line: bytes(line["query_key"])), schema=ANSWER)
    made = {"task_fingerprint": task.fingerprint, "result": answered_by(name, mark, source), "task": task.name}
    return keep(store, "precompute", mark, {"answers/shard-00000": table}, **made)


def label(store: Storage, queries: list[str]) -> None:
    rows = [{"query_key": query_key(q), "query": q, "answer": canonical(RIGHT), "count": 3, "stratum": "tail"} for q in queries]
    keep(store, "plan", SHOP, {"human_labels": pa.Table.from_pylist(rows, schema=HUMAN_LABELS)})


def config(store: Storage, server: Server, **fields: Any) -> judge.Config:
    model = {"engine": "openai", "model": "mistral-small", "base_url": server.url, "concurrency": 8}
    data = {"root": store.root, "tracking": OFF, "task": "query_intent", "model": model, "answers": "s" * 16, **fields}
    return judge.Config.model_validate(data)


def says_what_it_sees(server: Server, wrong_every: int = 10) -> None:
    """A judge that knows the right answer, and errs on each tenth query."""

    def reply(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        right, number = '"price"' in text.rpartition("Answer:")[2], int(text.partition("Query: q")[2].split()[0])
        return 200, chat(json.dumps({"verdict": "right" if right != (number % wrong_every == 0) else "wrong"})), {}

    server.reply = reply


def figures(store: Storage, receipt: Receipt[judge.Result]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["figure"], row["stratum"]): row for row in output_table(store, receipt, "figures").to_pylist()}


@pytest.mark.slow
def test_a_judge_is_asked_measured_and_read_by_the_gate(store: Storage, intent: Task, endpoint: Server, answer_here: None) -> None:
    """60 labelled rows and 300 others of 400; the gate's bound rests on the judge's table as on any made by hand."""
    queries = [f"q{i} shoes" for i in range(400)]
    given = {q: None if i % 40 == 7 else RIGHT if i % 20 else WRONG for i, q in enumerate(queries)}
    label(store, queries[:60])
    answers(store, intent, "t" * 16, dict.fromkeys(queries, RIGHT), "Qwen/Qwen2.5-7B-Instruct")
    answers(store, intent, "s" * 16, given, "distill/" + "d" * 16, "batch_student")
    keep(store, "distill", "d" * 16, {}, result=DistillResult(digest="s" * 16, base="mistral-tiny"), inputs={"t": "precompute/" + "t" * 16})
    says_what_it_sees(endpoint)
    receipt = judge.run(config(store, endpoint, rows=300))
    table = output_table(store, receipt, "scores").to_pylist()
    assert receipt.rows == {"judged": 360, "labelled": 60, "without_verdict": 0}
    silent = [row for row in table if row["answer"] is None]
    assert {row["score"] for row in silent} == {0.0}
    assert len(endpoint.asked) == 360 - len(silent), "an answer that is not there is wrong without asking"
    question = endpoint.asked[0][1]["messages"][-1]["content"]
    assert any("Answer: " + canonical(answer) in question for answer in (RIGHT, WRONG))
    task_text = intent.messages("x")[0]["content"].strip().splitlines()[0]
    assert task_text in question, "the judge sees what the model was asked"
    assert receipt.result.agreement == pytest.approx(52 / 58, abs=0.03)  # of the answered ones: each tenth is judged wrongly
    assert receipt.result.families == {"judge": ("mistral",), "answers": ("mistral", "qwen")}
    assert receipt.result.same_family
    assert any("kind to their own family" in note for note in receipt.notes)
    assert judge.run(config(store, endpoint, rows=300)).reused
    assert read_text(store, "precompute/LATEST") == "precompute/" + "s" * 16, "the task's own answers stay the latest"

    sources = {"teacher": "t" * 16, "batch_student": "s" * 16}
    evaluate.run(evaluate.Config(root=store.root, tracking=OFF, task="query_intent", answers=sources, resamples=200))
    asked = gate.Config(root=store.root, tracking=OFF, task="query_intent", judge=f"{receipt.path}:scores")
    found = gate.run(asked, task=with_policy(intent, minimum={"tail": 0.7})).result.evidence
    assert found.judge is not None
    assert (found.judge.rows, found.judge.left_out, found.judge.answers_checked) == (360, 0, True)
    assert (found.judge.name, found.judge.own_teacher) == ("mistral-small", False)
    assert (found.criteria[0].n, found.criteria[0].judged) == (60, 300)


@pytest.mark.slow
def test_a_pair_is_asked_in_both_orders_and_a_liking_for_the_first_place_is_found(
    store: Storage, intent: Task, endpoint: Server, answer_here: None
) -> None:
    queries = [f"q{i} shoes" for i in range(120)]
    label(store, queries[:80])
    answers(store, intent, "s" * 16, {q: RIGHT if i % 4 else WRONG for i, q in enumerate(queries)}, "gemma-3-1b", "batch_student")
    answers(store, intent, "t" * 16, {q: RIGHT if i % 3 else None if i % 2 else WRONG for i, q in enumerate(queries)}, "Qwen2.5-7B")

    def reply(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        number = int(text.partition("Query: q")[2].split()[0])
        first = '"price"' in text.rpartition("First answer:")[2].partition("Second answer:")[0]
        return 200, chat(json.dumps({"verdict": "first" if number % 3 == 0 or first else "second"})), {}

    endpoint.reply = reply
    receipt = judge.run(config(store, endpoint, judge="answer_preference", against="t" * 16))
    rows = {row["query"]: row for row in output_table(store, receipt, "preferences").to_pylist()}
    assert rows["q1 shoes"]["score"] == 0.5
    assert rows["q1 shoes"]["verdict"] is None, "equal answers are a tie, and not asked about"
    assert rows["q4 shoes"]["score"] == 0.0
    assert rows["q3 shoes"]["score"] == 1.0, "the other one did not answer"
    assert rows["q6 shoes"]["score"] == 0.5, "first in either order"
    found = figures(store, receipt)
    assert found["bias_position", "all"]["low"] > 0
    assert found["same_in_both_orders", "all"]["value"] < 1
    assert any("prefers the answer that is shown first" in note for note in receipt.notes)
    assert "scores" not in receipt.outputs, "the gate does not take a preference for a quality"


# ---- figures of planted judges


def named(rows: JudgeRows, pairwise: bool) -> dict[str, JudgeFigure]:
    return {figure.figure: figure for figure in judge_figures(rows, pairwise, 0.95)}


@pytest.mark.parametrize("pairwise, bias", [(False, "length"), (False, "family"), (True, "length"), (True, "family"), (True, "position")])
def test_a_planted_bias_is_found_and_an_honest_judge_has_none(pairwise: bool, bias: str) -> None:
    biased = named(planted(500, 1, pairwise, **{bias: 0.4}), pairwise)[f"bias_{bias}"]
    assert biased.low is not None
    assert biased.low > 0
    missed = 0
    for seed in range(30):
        honest = named(planted(100, seed, pairwise), pairwise)[f"bias_{bias}"]
        assert honest.low is not None
        assert honest.high is not None
        missed += not honest.low <= 0 <= honest.high
    assert missed <= 5  # 1.5 expected at most; betting's intervals are wider than they need be


def test_a_mean_is_covered_however_few_and_lopsided_the_rows() -> None:
    rng, missed = np.random.default_rng(0), 0
    for i in range(200):
        values = np.where(rng.random((12, 60)[i % 2]) < 0.05, 1.0, -0.5)
        found = mean_figure("x", "all", values, 1, 0.95)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= -0.425 <= found.high
    assert missed <= 16  # 10 expected at most


def test_kappa_is_sklearns_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    truth = 0.4  # of two raters that both say 1 half of the time and agree on 70 % of rows
    covered = 0
    for _ in range(100):
        people = (rng.random(150) < 0.5).astype(float)
        says = np.where(rng.random(150) < 0.7, people, 1 - people)
        found = kappa_figure(says, people, 0.95)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.value == pytest.approx(cohen_kappa_score(says, people))
        covered += found.low <= truth <= found.high
    assert 89 <= covered <= 99
    few = kappa_figure(np.array([0.0, 1, 1]), np.array([0.0, 1, 0]), 0.95)
    assert few is not None
    assert few.low is None, "3 rows have no right to an interval"
    assert kappa_figure(np.ones(50), np.ones(50), 0.95) is None


# ---- who and what is judged


@pytest.mark.parametrize(
    "name, family",
    [
        *(("Qwen/Qwen2.5-7B-Instruct", "qwen"), ("meta-llama/Llama-3.1-8B", "llama"), ("Meta-Llama-3-8B", "llama"), ("o3-mini", "gpt")),
        *(("gpt-4o", "gpt"), ("/models/mixtral-8x7b/", "mistral"), ("example:teacher", "example"), ("our-own-7b", "claude")),
    ],
)
def test_a_family_is_the_first_word_of_a_name(name: str, family: str) -> None:
    assert model_family(name, {"our-own-7b": "claude"}) == family


def test_the_draw_is_even_whatever_the_answers_order_or_state() -> None:
    rows = [{"query_key": query_key(str(i)), "query": str(i), "state": "answered", "answer": "{}", "stratum": "tail"} for i in range(5000)]
    schema = pa.schema([ANSWER.field(name) for name in ("query_key", "query", "answer_key", "state", "answer", "count", "stratum")])
    whole = pa.Table.from_pylist(rows, schema=schema)
    labelled = pa.array([query_key("7")], KEY)
    drawn = draw_rows([whole], labelled, NONE, 1000, 0)
    assert len(drawn) == 1001
    assert [row["query"] for row in drawn if row["labelled"]] == ["7"]
    backwards = whole.take(pa.array(range(4999, -1, -1)))
    assert draw_rows([backwards.slice(0, 17), backwards.slice(17)], labelled, NONE, 1000, 0) == drawn
    assert abs(np.mean([int(row["query"]) for row in drawn]) - 2500) < 150
    assert {row["query"] for row in draw_rows([whole], labelled, NONE, 1000, 1)} != {row["query"] for row in drawn}
    learnt = pa.array([query_key(str(i)) for i in range(4500)], KEY)  # "7" is labelled: asked, for its label; of the others none
    rest = draw_rows([whole], labelled, learnt, 1000, 0)
    assert (len(rest), min(int(row["query"]) for row in rest if not row["labelled"])) == (501, 4500)


def test_labels_from_before_there_were_designs_calibrate(store: Storage, intent: Task, endpoint: Server, answer_here: None) -> None:
    queries = [f"q{i} shoes" for i in range(30)]
    label(store, queries[:20])
    old = output_table(store, load_receipt(store, "plan", "plan"), "human_labels")
    keep(store, "plan", SHOP, {"human_labels": old.drop_columns(["design", "inclusion"])})
    answers(store, intent, "s" * 16, dict.fromkeys(queries, RIGHT), "Qwen/Qwen2.5-7B-Instruct")
    says_what_it_sees(endpoint)
    assert judge.run(config(store, endpoint)).rows == {"judged": 30, "labelled": 20, "without_verdict": 0}


def test_a_rubric_must_fit_its_schema(tmp_path: Path, intent: Task) -> None:
    folder = Path(shutil.copytree(EXAMPLES / "answer_judge", tmp_path / "own"))
    load_rubric(load_task(folder), intent)
    for text, said in (
        ("kind: pointwise\nfield: verdict\nscores: {right: 1, wrong: 0}\n", "field scores"),
        ("kind: pointwise\nfield: mark\nscores: {right: 1, wrong: 0}\n", "no such list"),
        ("kind: pointwise\nfield: verdict\nscores: {right: 2, partly: 1, wrong: 0}\n", "between 0 and 1"),
        ("kind: pairwise\nfield: verdict\nscores: {right: 1, partly: 0.5, wrong: 0}\n", "field side_inputs"),
    ):
        (folder / "judge.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_rubric(load_task(folder), intent)
    (folder / "judge.yaml").unlink()
    with pytest.raises(ConfigError, match="no judge"):
        load_rubric(load_task(folder), intent)


def test_what_cannot_be_judged_is_refused(store: Storage, intent: Task, endpoint: Server) -> None:
    label(store, ["q1"])
    answers(store, intent, "s" * 16, {"q1": None}, "m")
    with pytest.raises(ConfigError, match="compares two"):
        judge.run(config(store, endpoint, judge="answer_preference"))
    with pytest.raises(ConfigError, match="of another task"):
        judge.run(config(store, endpoint, task="query_segmentation"))
    with pytest.raises(InputError, match="nothing to ask"):
        judge.run(config(store, endpoint))
    with pytest.raises(ConfigError, match="set judge"):
        config(store, endpoint, precompute={"task": "x"})
