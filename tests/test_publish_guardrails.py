"""Wrong text does not reach a snapshot: it is withheld, counted, shown, and live the same guard says the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.cache import read_manifest
from headtail.cache.words import MOST_WORDS, count_words, load_words
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import QUERY, with_side_inputs
from headtail.core.task import Task
from headtail.releases import lookup, release
from headtail.stages import publish
from test_cache import answers, good

OFF = TrackingConfig(enabled=False)
LOG = {"pizza": 50, "denver": 20, "pizza denver": 9, "piza denver": 2, "hotel": 1}


def spans(*texts: str) -> str:
    return json.dumps({"segments": [{"label": "topic", "text": text} for text in texts]}, separators=(",", ":"))


def log(store: Storage) -> Receipt:
    rows = [{"query_key": query_key(q), "query": q, "count": n, "businesses": ["plaza grill"]} for q, n in LOG.items()]
    schema = with_side_inputs(QUERY, ("businesses",))
    return keep(store, "ingest", "c0ffee00", {"queries": pa.Table.from_pylist(rows, schema=schema)})


def answered(store: Storage, task: Task, mark: str, source: str, inputs: dict[str, str], *pairs: tuple[str, str]) -> Receipt:
    tables = sorted((answers(good(q, a, source)) for q, a in pairs), key=lambda table: table.column("query_key")[0].as_py())
    shards = {f"answers/shard-{i:05d}": table for i, table in enumerate(tables)}
    return keep(store, "precompute", mark, shards, inputs=inputs, task_fingerprint=task.fingerprint, result=answered_by(source=source))


def published(root: str, task: str, *receipts: Receipt, **options: object) -> Receipt[publish.Result]:
    data = {"root": root, "tracking": OFF, "task": task, "answers": tuple(r.path for r in receipts), "max_lost_share": 1, **options}
    return publish.run(build_config(publish.Config, data, where="test"))


def test_wrong_text_is_withheld_and_the_next_source_answers(store: Storage, root: str, segmentation: Task) -> None:
    inputs = {"log": log(store).path}
    pairs = {"pizza": ("pizza", "denver"), "denver": ("denver",), "piza denver": ("pizza", "denver"), "hotel": ("motel",)}
    teacher = answered(store, segmentation, "a" * 16, "teacher", inputs, *((query, spans(*texts)) for query, texts in pairs.items()))
    student = answered(store, segmentation, "b" * 16, "batch_student", inputs, ("pizza", spans("pizza")))
    made = published(root, "query_segmentation", teacher, student)
    assert made.rows["published"] == 3
    assert made.rows["left_out.guardrail.span_not_in_query"] == 1
    assert made.rows["left_out.guardrail.correction_unknown"] == 1
    assert made.metrics["withheld"] == 2
    assert [(one.query, one.reason, one.source) for one in made.result.withheld] == [
        ("hotel", "correction_unknown", "teacher"),
        ("pizza", "span_not_in_query", "teacher"),
    ]
    assert any(note.startswith("2 answers are withheld by the task's guardrails: 1 ") for note in made.notes)
    assert lookup.look_up(store, "pizza")["source"] == "batch_student"
    assert not lookup.look_up(store, "hotel")["cached"]
    guard = release.open_guard(store, release.current_release(store))
    for row in made.result.withheld:
        assert guard.reason(row.query, json.loads(row.answer)) == row.reason
    assert guard.reason("piza denver", json.loads(spans("pizza", "denver"))) == ""


def test_the_log_s_words_lie_beside_the_snapshot(store: Storage, root: str, segmentation: Task) -> None:
    made = published(
        root, "query_segmentation", answered(store, segmentation, "a" * 16, "teacher", {"log": log(store).path}, ("x", spans("x")))
    )
    words = load_words(store, made.result.snapshot)
    assert words == {"plaza": 82, "grill": 82, "pizza": 59, "denver": 31}  # `piza` and `hotel` have fewer than known_count events
    assert read_manifest(store, made.result.snapshot).files["words"] == made.output("words")


def test_without_a_log_guardrails_hold_without_words(store: Storage, root: str, segmentation: Task) -> None:
    made = published(
        root, "query_segmentation", answered(store, segmentation, "a" * 16, "teacher", {}, ("pizzas", spans("pizzaz")), ("a", spans("b")))
    )
    assert (made.rows["published"], made.metrics["withheld"]) == (1, 1)
    assert any("do not look up words" in note for note in made.notes)
    assert load_words(store, made.result.snapshot) == {}


def test_guardrails_are_part_of_a_publish_and_of_the_release(store: Storage, root: str, segmentation: Task, tmp_path: Path) -> None:
    answered_rows = answered(store, segmentation, "a" * 16, "teacher", {}, ("pizza", spans("pizza", "denver")), ("a", spans("a")))
    assert published(root, "query_segmentation", answered_rows).rows["published"] == 1
    folder = shutil.copytree(segmentation.folder, tmp_path / "task")
    text = (folder / "task.yaml").read_text()
    (folder / "task.yaml").write_text(text.replace("guardrails: {cover: all}", "guardrails: {enabled: false}"))
    loose = published(root, str(folder), answered_rows)
    assert (loose.reused, loose.rows["published"], loose.result.withheld) == (False, 2, ())
    now = release.current_release(store)
    assert release.open_task(now).file.guardrails.enabled is False
    assert not release.open_guard(store, now).active


def test_a_check_of_ones_own_needs_the_flag_and_a_publish_with_nothing_left_is_refused(
    store: Storage, root: str, segmentation: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_fine.py").write_text("def check(query, answer):\n    return 'never'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(segmentation.folder, tmp_path / "task")
    text = (folder / "task.yaml").read_text()
    (folder / "task.yaml").write_text(text.replace("{cover: all}", "{check: 'never_fine:check'}"))
    rows = answered(store, segmentation, "a" * 16, "teacher", {}, ("pizza", spans("pizza")))
    with pytest.raises(ConfigError, match="guardrails name Python code"):
        published(root, str(folder), rows)
    with pytest.raises(InputError, match="nothing is fit to be published") as refused:
        published(root, str(folder), rows, allow_task_code=True)
    assert "1 guardrail.check.never" in str(refused.value)


def test_counting_words_in_batches_is_counting_them_at_once() -> None:
    rows = [{"query": f'word{i % 7} (common), "odd"', "count": i} for i in range(100)]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("query", pa.string()), ("count", pa.int64())]))
    whole = count_words([table], least=1)
    assert whole.to_pylist() == count_words(table.to_batches(max_chunksize=3), least=1).to_pylist()
    assert whole.to_pylist()[0] == {"word": "common", "count": 4950}
    assert whole.num_rows == 9 <= MOST_WORDS
    assert count_words([table], least=100_000).num_rows == 0
    assert count_words([], least=1).num_rows == 0
