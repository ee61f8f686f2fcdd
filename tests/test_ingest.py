"""Ingest against a plain count in Python: formats, shards, cuts, human labels, and every row used or set aside."""

from __future__ import annotations

import bisect
import csv
import datetime
import gzip
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.count_classes import count_class
from headtail.core.errors import InputError, LedgerError, StorageError
from headtail.core.keys import normalise, query_key
from headtail.core.receipt import Receipt
from headtail.core.redact import redact
from headtail.core.rows import HOLDOUT, HUMAN_LABELS, QUERY, SET_ASIDE, key_words, shards_of, uniform_draw, with_side_inputs
from headtail.core.task import Task
from headtail.core.typed_answer import _fit
from headtail.stages.ingest import Config, LogColumns, history, run, tally
from headtail.stages.ingest.human_labels import _answer
from headtail.stages.ingest.intake import REASONS
from headtail.stages.ingest.result import Result
from headtail.stages.ingest.texts import CARD, EMAIL, PHONE, clean_texts, screen_texts
from timescale import limit

OFF = TrackingConfig(enabled=False)
TIMED = LogColumns(count="n", time="time")
DAY = datetime.date(2024, 1, 1)

Ingest = Callable[..., Receipt[Result]]


@pytest.fixture
def ingest(root: str, tmp_path: Path) -> Ingest:
    """Ingest a text given as `name=content` or a path; further fields of Config by name."""

    def do(content: str | bytes | Path, name: str = "log.csv", **fields: Any) -> Receipt[Result]:
        path = content if isinstance(content, Path) else tmp_path / name
        if not isinstance(content, Path):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return run(Config(**({"root": root, "log": str(path), "task": "query_intent", "tracking": OFF} | fields)))

    return do


def table(root: str, receipt: Receipt, name: str) -> pa.Table:
    return output_table(open_storage(root), receipt, name)


def counts(root: str, receipt: Receipt, name: str = "queries") -> dict[str, int]:
    found = table(root, receipt, name)
    return dict(zip(found["query"].to_pylist(), found["count"].to_pylist(), strict=True))


def aside(root: str, receipt: Receipt) -> list[tuple[int, str]]:
    found = table(root, receipt, "set_aside")
    return sorted(zip(found["row"].to_pylist(), found["reason"].to_pylist(), strict=True))


def test_a_small_log(ingest: Ingest, root: str) -> None:
    text = (
        "query,n,time\nPizza  Near Me,3,2024-01-01\npizza near me,1,2024-01-02\nsushi,4,2024-01-02\nvet,1,2024-01-03\nsushi,2,2024-01-03\n"
    )
    receipt = ingest(text, columns=TIMED)
    found = table(root, receipt, "queries")
    assert found.schema == with_side_inputs(QUERY, [])
    rows = found.to_pylist()
    assert sorted(row["query"] for row in rows) == ["pizza near me", "sushi"]
    assert [row["query_key"] for row in rows] == sorted(query_key(row["query"]) for row in rows), "equal counts: by key"
    pizza = next(row for row in rows if row["query"] == "pizza near me")
    assert (pizza["count"], pizza["first_day"], pizza["last_day"]) == (4, DAY, DAY + datetime.timedelta(days=1))
    holdout = table(root, receipt, "holdout")
    assert holdout.schema == HOLDOUT
    assert {row["query"]: (row["count"], row["seen"]) for row in holdout.to_pylist()} == {"vet": (1, False), "sushi": (2, True)}
    expected = {"events": 11, "used_events": 8, "holdout_events": 3, "queries": 2, "holdout_queries": 2, "set_aside": 0, "log_rows": 5}
    assert expected.items() <= receipt.rows.items()
    assert receipt.metrics["unseen_share_holdout_events"] == pytest.approx(1 / 3)
    assert receipt.metrics["unseen_share_holdout_queries"] == pytest.approx(1 / 2)
    assert receipt.result.holdout_from == "2024-01-03"
    assert table(root, receipt, "set_aside").schema == SET_ASIDE
    assert table(root, receipt, "human_labels").schema == HUMAN_LABELS


class ReferenceLog:
    """A random log and, counted in plain Python, what ingest must make of it."""

    def __init__(self, seed: int, rows: int = 400) -> None:
        rng = random.Random(seed)
        vocabulary = [f"Query {i}" for i in range(60)] + ["été", '5" tv', "a|b", "call 555-234-5678", "x@y.org mail", "", "  ", "q" * 300]
        rng.shuffle(vocabulary)
        self.rows = []
        for _ in range(rows):
            query = rng.choice(vocabulary[: rng.randrange(1, len(vocabulary) + 1)])
            side = rng.choice([None, None, ["One", f"two {rng.randrange(9)}"], []])
            count = rng.choice(["1", "1", "2", "7", "0", "x"])
            self.rows.append((query, count, (DAY + datetime.timedelta(days=rng.randrange(5))).isoformat(), side))

    def expected(self, holdout_days: int = 1) -> dict[str, Any]:
        last = max(date for query, count, date, _ in self.rows if self._reason(query, count) == "")
        cut = (datetime.date.fromisoformat(last) - datetime.timedelta(days=holdout_days - 1)).isoformat()
        before, holdout, side, reasons = Counter[str](), Counter[str](), {}, Counter[str]()
        days: dict[str, list[str]] = defaultdict(list)
        for query, count, date, viewed in sorted(self.rows, key=lambda row: row[2]):  # stable: later rows of a day win
            reason = self._reason(query, count)
            if reason:
                reasons[reason] += 1
                continue
            text = redact(normalise(query)).text
            (holdout if date >= cut else before)[text] += int(count)
            if date < cut:
                days[text].append(date)
                if viewed:
                    side[text] = viewed
        return {
            "queries": dict(before),
            "holdout": dict(holdout),
            "side": {text: side.get(text) for text in before},
            "days": {text: (min(dates), max(dates)) for text, dates in days.items()},
            "reasons": dict(reasons),
        }

    @staticmethod
    def _reason(query: str, count: str) -> str:
        if not query.strip():
            return "empty"
        if len(query) > 200:
            return "too_long"
        return "" if count.isdigit() and int(count) else "bad_count"

    def write(self, folder: Path, kind: str, files: int = 1) -> Path:
        folder.mkdir(exist_ok=True)
        step = -(-len(self.rows) // files)
        for part in range(files):
            self._write(folder / f"part-{part}.{kind}", self.rows[part * step : (part + 1) * step])
        return folder

    @staticmethod
    def _write(path: Path, rows: list[tuple[str, str, str, list[str] | None]]) -> None:
        names = ("query", "n", "time", "businesses")
        if path.suffix == ".parquet":
            columns = [pa.array(column) for column in list(zip(*rows, strict=True))[:3]]
            pq.write_table(pa.table([*columns, pa.array([row[3] for row in rows], pa.list_(pa.string()))], names), path, row_group_size=37)
        elif ".jsonl" in path.name:
            data = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        else:
            tab = path.suffix == ".tsv"
            with path.open("w", newline="", encoding="utf-8") as file:
                cells = [names, *((query, count, date, "|".join(side or [])) for query, count, date, side in rows)]
                file.writelines("\t".join(row) + "\n" for row in cells) if tab else csv.writer(file).writerows(cells)


def check(root: str, receipt: Receipt, wanted: dict[str, Any]) -> None:
    queries = table(root, receipt, "queries")
    assert counts(root, receipt) == wanted["queries"]
    assert counts(root, receipt, "holdout") == wanted["holdout"]
    rows = queries.to_pylist()
    assert rows == sorted(rows, key=lambda row: (-row["count"], row["query_key"]))
    assert {row["query"]: row["businesses"] for row in rows} == wanted["side"]
    assert {row["query"]: (row["first_day"].isoformat(), row["last_day"].isoformat()) for row in rows} == wanted["days"]
    assert all(row["query_key"] == query_key(row["query"]) for row in rows)
    assert dict(Counter(table(root, receipt, "set_aside")["reason"].to_pylist())) == wanted["reasons"]
    holdout = table(root, receipt, "holdout").to_pylist()
    assert {row["query"] for row in holdout if row["seen"]} == set(wanted["holdout"]) & set(wanted["queries"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_it_counts_what_plain_python_counts(ingest: Ingest, root: str, tmp_path: Path, kind: str, seed: int) -> None:
    reference = ReferenceLog(seed)
    log = reference.write(tmp_path / "log", kind, files=1 + seed)
    check(root, ingest(log, task="query_segmentation", columns=TIMED, holdout_days=1 + seed % 2), reference.expected(1 + seed % 2))


@pytest.mark.parametrize("held", [1, 50, 10**6])
@pytest.mark.parametrize("shards", [1, 7])
def test_shards_and_spilling_change_nothing(
    ingest: Ingest, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, shards: int
) -> None:
    monkeypatch.setattr(tally, "HELD_ROWS", held)
    monkeypatch.setattr("headtail.stages.ingest.logfile.BATCH_ROWS", 29)
    reference = ReferenceLog(9)
    log = reference.write(tmp_path / "log", "parquet", files=3)
    receipt = ingest(log, task="query_segmentation", columns=TIMED, shards=shards)
    wanted = reference.expected()
    check(root, receipt, wanted)
    assert receipt.metrics["redacted_phone"] == wanted["queries"].get("call <phone>", 0) + wanted["holdout"].get("call <phone>", 0) > 0


@pytest.mark.slow
def test_ray_tasks_count_the_same(ingest: Ingest, root: str, tmp_path: Path, cluster: None) -> None:
    reference = ReferenceLog(5, rows=600)
    log = reference.write(tmp_path / "log", "parquet", files=3)
    receipt = ingest(log, task="query_segmentation", columns=TIMED, workers=2, shards=3)
    check(root, receipt, reference.expected())
    (log / "part-1.parquet").unlink()
    pq.write_table(pa.table({"query": [[1]], "n": ["1"], "time": ["2024-01-01"]}), log / "part-1.parquet")
    with pytest.raises(InputError, match="does not hold text"):
        ingest(log, task="query_segmentation", columns=TIMED, workers=2)


TWO_NODES = """
import sys
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster
from headtail.core.config import TrackingConfig
from headtail.stages.ingest import Config, LogColumns, run

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path)}})
assert len(ray.nodes()) == ray.cluster_resources()["CPU"] == 2
columns, tracking = LogColumns(count="n", time="time"), TrackingConfig(enabled=False)
for root, workers in ((sys.argv[2], 1), (sys.argv[3], 2)):
    made = run(Config(root=root, log=sys.argv[1], task="query_segmentation", columns=columns, tracking=tracking, workers=workers, shards=3))
    same = [f"{name}={ref.sha256}" for name, ref in made.outputs.items() if name != "set_aside"]  # its row groups follow the parts
    print(*same, made.rows, made.result.rules, pq.read_table(f"{root}/{made.outputs['set_aside'].path}").to_pylist())
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.slow
def test_two_nodes_write_the_bytes_that_one_process_writes(tmp_path: Path) -> None:
    log = ReferenceLog(6, rows=600).write(tmp_path / "log", "parquet", files=4)
    arguments = [str(log), str(tmp_path / "here"), str(tmp_path / "there")]
    done = subprocess.run([sys.executable, "-c", TWO_NODES, *arguments], capture_output=True, text=True, timeout=limit(180))
    assert done.returncode == 0, done.stderr
    here, there = [line for line in done.stdout.splitlines() if line.startswith("history=")]
    assert here == there


def test_every_row_is_used_or_set_aside_with_a_reason(ingest: Ingest, root: str) -> None:
    rows = [
        (b"good,1,2024-01-01", ""),
        (b"caf\xe9,1,2024-01-01", "not_utf8"),
        (b",1,2024-01-01", "empty"),
        (b"   ,1,2024-01-01", "empty"),
        (b"\xe2\x80\x8b,1,2024-01-01", "empty"),
        (b"x" * 201 + b",1,2024-01-01", "too_long"),
        (b"y" * 1_000_000 + b",1,2024-01-01", "too_long"),
        (b"a,0,2024-01-01", "bad_count"),
        (b"a,1.5,2024-01-01", "bad_count"),
        (b"a,2.0,2024-01-01", ""),
        (b"a,,2024-01-01", "bad_count"),
        (b"a,1,yesterday", "bad_time"),
        (b"a,1,", "bad_time"),
        (b"a,1", "bad_row"),
        (b"a,1,2024-01-01,more", "bad_row"),
        (b"", "empty"),
        (b'"never closed,1,2024-01-01', ""),
        (b'5" pipe,1,2024-01-01', ""),
        (b"holdout,1,2024-01-02", ""),
    ]
    receipt = ingest(b"\xef\xbb\xbfquery,n,time\r\n" + b"\r\n".join(row for row, _ in rows) + b"\r\n", columns=TIMED)
    assert aside(root, receipt) == [(i + 1, reason) for i, (_, reason) in enumerate(rows) if reason]
    found = table(root, receipt, "set_aside")
    assert set(found["file"].to_pylist()) == {"log.csv"}
    assert max(len(text) for text in found["text"].to_pylist()) == 200
    texts = dict(zip(found["row"].to_pylist(), found["text"].to_pylist(), strict=True))
    assert texts[2] == "caf\ufffd"
    assert texts[9] == "'1.5' for a"
    assert texts[12] == "'yesterday' for a"
    assert counts(root, receipt) == {"good": 1, "a": 2, '"never closed': 1, '5" pipe': 1}
    assert receipt.rows["set_aside"] == 14 == sum(n for name, n in receipt.rows.items() if name.startswith("set_aside."))
    assert receipt.rows["events"] == receipt.rows["used_events"] + receipt.rows["holdout_events"] + receipt.rows["set_aside"] == 20
    assert receipt.rows["log_rows"] == len(rows)


def test_side_inputs_that_are_not_utf8(ingest: Ingest, root: str) -> None:
    log = b"query,businesses\na,One|Two\nb,caf\xe9\nc,\n"
    receipt = ingest(log, task="query_segmentation", holdout_share=0.0)
    assert aside(root, receipt) == [(2, "not_utf8")]
    sides = table(root, receipt, "queries").to_pylist()
    assert {row["query"]: row["businesses"] for row in sides} == {"a": ["One", "Two"], "c": None}


def test_personal_data_is_nowhere(ingest: Ingest, root: str) -> None:
    secrets = ["ann.lee@example.org", "4111 1111 1111 1111", "+49 171 1234567"]
    lines = [f"mail {secrets[0]},2", f"CARD {secrets[1]},3", f"call {secrets[2]},x", f"call {secrets[2]},1", f"{'z ' * 150}{secrets[0]},1"]
    receipt = ingest("query,n\n" + "\n".join(lines) + "\n", columns=LogColumns(count="n"), holdout_share=0.0)
    assert counts(root, receipt) == {"mail <email>": 2, "card <card>": 3, "call <phone>": 1}
    assert {name: receipt.metrics[f"redacted_{name}"] for name in ("email", "card", "phone")} == {"email": 2, "card": 3, "phone": 1}
    everything = json.dumps([str(table(root, receipt, name).to_pylist()) for name in ("queries", "holdout", "set_aside")])
    assert not any(secret in everything for secret in secrets)
    kept = ingest("query,n\n" + "\n".join(lines) + "\n", columns=LogColumns(count="n"), holdout_share=0.0, redact=False)
    assert f"mail {secrets[0]}" in counts(root, kept)


SPELLINGS = st.text(max_size=30) | st.text(alphabet="aZ 0159@.-+\t", max_size=30) | st.text(alphabet="aZ  \u2019\u00e9\x7f", max_size=8)


@given(st.lists(SPELLINGS, unique=True, max_size=20), st.booleans(), st.integers(0, 2))
def test_cleaning_in_bulk_is_normalise_and_redact(spellings: list[str], redacting: bool, skipped: int) -> None:
    """Also of a slice, and of texts that stand side by side with blanks at their ends."""
    raw = pa.array([text.encode("utf-8", "surrogatepass") for text in spellings], pa.binary())[skipped:]
    first = screen_texts(raw, 25, redacting)
    clean = clean_texts(first.texts.filter(pa.array(first.reasons == 0)), redacting)
    rows = dict(zip(np.flatnonzero(first.reasons == 0).tolist(), range(len(clean.queries)), strict=True))
    for i, value in enumerate(raw.to_pylist()):
        text = normalise(value.decode()) if value.decode(errors="ignore").encode() == value else None
        reason = "nul" if b"\0" in value else "not_utf8" if text is None else "empty" if not text else "too_long" if len(text) > 25 else ""
        assert REASONS[first.reasons[i]] == reason
        if text and not reason:
            at, single = rows[i], " ".join(value.decode().split())
            redaction = redact(text)
            assert clean.queries[at].as_py() == (redaction.text if redacting else text)
            marks = redaction.email * EMAIL | redaction.phone * PHONE | redaction.card * CARD
            assert first.marks[i] | clean.marks[at] == (marks if redacting else 0)
            changes = (single != value.decode(), single.casefold() != single, text != single.casefold(), redacting and redaction.any)
            assert first.rules[i] | clean.rules[at] == sum(1 << bit for bit, changed in enumerate(changes) if changed)


def test_what_each_rule_of_the_normal_form_brings(ingest: Ingest) -> None:
    rows = ["pizza,5", "Pizza,3", "PIZZA ,1", "joe's,2", "joe\u2019s,4", "SUSHI,7", "call 555-234-5678,1", "call 555-234-5679,1", "a  b,2"]
    for shards in (1, 3):
        receipt = ingest("query,n\n" + "\n".join(rows), columns=LogColumns(count="n"), holdout_share=0.2, shards=shards)
        found = {rule.rule: (rule.changed_events * 26, rule.merged_events * 26, rule.merged_queries) for rule in receipt.result.rules}
        assert {name: tuple(map(round, numbers)) for name, numbers in found.items()} == {
            "blanks": (3, 1, 1),  # nobody types "a b"
            "case": (11, 4, 1),  # nor "sushi"
            "characters": (4, 4, 1),
            "personal_data": (2, 0, 0),
        }
    assert any("case 15.4%" in note for note in receipt.notes)


def test_without_times_a_share_is_held_out_by_draw(ingest: Ingest, root: str) -> None:
    log = "query,n\n" + "".join(f"q{i},{1 + 5000 // (i + 1)}\n" for i in range(3000))
    columns = LogColumns(count="n")
    receipts = [ingest(log, columns=columns, holdout_share=0.2, seed=seed, shards=shards) for seed, shards in ((1, 1), (2, 1))]
    total = sum(1 + 5000 // (i + 1) for i in range(3000))
    for receipt in receipts:
        assert receipt.rows["used_events"] + receipt.rows["holdout_events"] == total
        assert abs(receipt.rows["holdout_events"] / total - 0.2) < 0.01
        before, holdout = counts(root, receipt), counts(root, receipt, "holdout")
        assert all(before.get(f"q{i}", 0) + holdout.get(f"q{i}", 0) == 1 + 5000 // (i + 1) for i in range(3000))
        assert abs(holdout["q0"] / 5001 - 0.2) < 0.03
        assert table(root, receipt, "queries")["first_day"].null_count == receipt.rows["queries"]
        assert any("drawn at random" in note for note in receipt.notes)
    assert counts(root, receipts[0], "holdout") != counts(root, receipts[1], "holdout")
    shuffled = log.splitlines()[1:]
    random.Random(0).shuffle(shuffled)
    other = ingest("query,n\n" + "\n".join(shuffled) + "\n", name="other.csv", columns=columns, holdout_share=0.2, seed=1, shards=5)
    assert counts(root, other, "holdout") == counts(root, receipts[0], "holdout"), "neither order nor shards matter"


def test_draws_are_even_and_independent_between_purposes() -> None:
    keys = pa.array([query_key(str(i)) for i in range(20_000)], pa.binary(16))
    a, b = uniform_draw(keys, "teach", 0), uniform_draw(keys, "later", 0)
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.03
    assert abs(float(np.corrcoef(a, uniform_draw(keys, "teach", 1))[0, 1])) < 0.03
    assert np.histogram(a, 10, (0, 1))[0].min() > 1800
    assert np.array_equal(uniform_draw(keys.slice(100, 50), "teach", 0), a[100:150])
    order = np.lexsort(key_words(keys)[::-1])
    assert keys.take(pa.array(order)).to_pylist() == sorted(keys.to_pylist())


LABELS_LOG = "query\n" + "a\nb\nb\nc\nc\nc\n" + "d\n" * 4


def labels_in(root: str, receipt: Receipt, name: str = "human_labels") -> dict[str, str]:
    found = table(root, receipt, name)
    assert found.schema == HUMAN_LABELS
    return dict(zip(found["query"].to_pylist(), found["answer"].to_pylist(), strict=True))


def test_a_label_with_a_field_twice_is_no_label(ingest: Ingest, root: str, tmp_path: Path) -> None:
    lines = [
        '{"query": "a", "answer": {"intent": "price", "intent": "booking"}}',
        '{"query": "b", "answer": {"intent": "price"}}',
        '{"query": "c", "answer": {"\\u0069ntent": "price", "intent": "price"}}',
        '{"query": "d", "answer": "a: b", "answer": "price"}',
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.jsonl"), holdout_share=0.0)
    assert list(labels_in(root, receipt)) == ["b"]
    rows = table(root, receipt, "set_aside").sort_by("row").to_pylist()
    assert [(row["row"], row["reason"]) for row in rows] == [(1, "label_invalid"), (3, "label_invalid"), (4, "label_name_twice")]
    assert all("the field 'intent' occurs twice" in row["text"] for row in rows[:2])


def test_labels_are_checked_settled_and_counted(ingest: Ingest, root: str, tmp_path: Path, intent: Task) -> None:
    (tmp_path / "labels.jsonl").write_text(
        "\n".join(
            json.dumps({"query": query, "answer": answer})
            for query, answer in [
                ("A", "browse"),
                ("b", {"intent": "price"}),
                ("c", '{ "intent" : "browse" }'),
                ("c", "how_to"),
                ("c", "how_to"),
                ("d", "delivery"),
                ("d", "price"),
                ("not in the log", "browse"),
                ("wrong", "no such label"),
                ("blank", None),
                ("", "browse"),
                ("mail x@y.org", "browse"),
            ]
        )
    )
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.jsonl"), holdout_share=0.0)
    answers = {"a": "browse", "b": "price", "c": "how_to", "d": "delivery", "not in the log": "browse"}
    assert labels_in(root, receipt) == {query: intent.dump({"intent": label}) for query, label in answers.items()}
    rows = table(root, receipt, "human_labels").to_pylist()
    assert {row["query"]: row["count"] for row in rows} == {"a": 1, "b": 2, "c": 3, "d": 4, "not in the log": 0}
    assert {row["stratum"] for row in rows} == {""}
    assert receipt.rows["label_conflicts"] == 2
    assert any("2 queries had more than one human label" in note for note in receipt.notes)
    assert [reason for _, reason in aside(root, receipt)] == ["label_invalid", "label_invalid", "label_empty", "label_redacted"]
    assert receipt.rows["labels_set_aside"] == 4
    assert receipt.rows["set_aside"] == 0, "set of human labels aside is not events set aside"
    assert receipt.rows["events"] == 10


def test_labels_and_spans_are_taken_as_people_type_them(ingest: Ingest, root: str, tmp_path: Path) -> None:
    spans = [
        ("Thai  Food caf\u00e9", [("Thai Food ", "Topic"), ("cafe\u0301", "NAME")]),  # decomposed
        ("pizza near me", [("\u2068PIZZA\u2069", "topic"), ("near\u00a0me", "location")]),
        ("plumer", [("plumber", "topic")]),  # a correction
    ]
    rows = [(query, {"segments": [{"text": text, "label": label} for text, label in pairs]}) for query, pairs in spans]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps({"query": query, "answer": answer}) for query, answer in rows))
    receipt = ingest(LABELS_LOG, labels=str(path), task="query_segmentation", holdout_share=0.0)
    found = {query: [(s["text"], s["label"]) for s in json.loads(answer)["segments"]] for query, answer in labels_in(root, receipt).items()}
    assert found["thai food caf\u00e9"] == [("thai food", "topic"), ("caf\u00e9", "name")]
    assert found["pizza near me"] == [("pizza", "topic"), ("near me", "location")]
    assert any(note.startswith("1 people's answers have a span that is not in their query") for note in receipt.notes)


CHOICES = {
    "$defs": {"Kind": {"enum": ["Thai Food", "caf\u00e9", "x\u00b2", "US", "us"]}},
    "type": "object",
    "properties": {"kind": {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]}, "tags": {"type": "array", "items": {"const": "Ok"}}},
}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ({"kind": " thai  FOOD"}, {"kind": "Thai Food"}),
        ({"kind": "Cafe\u0301", "tags": ["OK", "Ok", "no"]}, {"kind": "caf\u00e9", "tags": ["Ok", "Ok", "no"]}),
        ({"kind": "x2"}, {"kind": "x2"}),
        ({"kind": "Us"}, {"kind": "Us"}),  # two choices are alike: nobody guesses
        ({"kind": None, "other": [{"kind": "thai food"}]}, {"kind": None, "other": [{"kind": "thai food"}]}),
    ],
)
def test_a_choice_is_the_one_that_it_is_after_normalisation(typed: Any, meant: Any) -> None:
    assert _fit(typed, CHOICES, CHOICES) == meant


@pytest.mark.parametrize("label", ["Browse", " how_to", "HOW_TO", "\uff42\uff52\uff4f\uff57\uff53\uff45"])
def test_a_bare_label_in_another_spelling_is_that_label(label: str, intent: Task) -> None:
    answer, problem = _answer(label.encode(), intent)
    assert (json.loads(answer or "{}").get("intent"), problem) == (normalise(label), "")


def test_many_redacted_queries_are_noted_by_kind_and_not_by_example(ingest: Ingest) -> None:
    few = ["call 5552345678", *(f"pizza {i}" for i in range(150))]
    assert not [note for note in ingest("query\n" + "\n".join(few), holdout_share=0.0).notes if "redacted" in note]
    many = ["call 5552349999", "5552345679 whatsapp ann@example.org", *(f"pizza {i}" for i in range(98))]
    (note,) = [note for note in ingest("query\n" + "\n".join(many), name="many.csv", holdout_share=0.0).notes if "redacted" in note]
    assert note.startswith("2.0% of log events had their query redacted: 1 e-mail addresses")
    assert "2 telephone numbers" in note
    assert "card" not in note
    assert not any(secret in note for secret in ("5552349999", "5552345679", "ann@"))


def test_labels_beside_the_queries_of_the_log(ingest: Ingest, root: str, segmentation: Task) -> None:
    answer = {"segments": [{"text": "sushi", "label": "topic"}]}
    with_labels = [("sushi", json.dumps(answer)), ("sushi", ""), ("vet", "{bad"), ("pizza", "")]
    log = "query\tlabels\n" + "".join(f"{query}\t{cell}\n" for query, cell in with_labels)
    receipt = ingest(log, name="log.tsv", task="query_segmentation", columns=LogColumns(labels="labels"), holdout_share=0.0)
    assert labels_in(root, receipt) == {"sushi": segmentation.dump(answer)}
    assert counts(root, receipt) == {"sushi": 2, "vet": 1, "pizza": 1}, "a row whose human labels are invalid is still an event"
    assert aside(root, receipt) == [(3, "label_invalid")]


def test_answers_that_json_lets_in_but_no_table_can_hold(segmentation: Task) -> None:
    lone = b'{"segments": [{"text": "\\ud800", "label": "topic"}]}'
    assert _answer(lone, segmentation)[0] is None
    assert "cannot be stored" in _answer(lone, segmentation)[1]


def test_labels_for_training_do_not_nearly_repeat_the_others(ingest: Ingest, root: str, tmp_path: Path) -> None:
    rows = [("best pizza in chicago", "test"), ("pizza best in chicago", "train"), ("best pizza in chicagoo", "train"), ("sushi", "train")]
    lines = [f"{query}\tbrowse\t{split}" for query, split in rows]
    (tmp_path / "labels.tsv").write_text("query\tanswer\tsplit\n" + "\n".join(lines) + "\n")
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.tsv"))
    assert list(labels_in(root, receipt, "human_labels_train")) == ["sushi"]
    assert list(labels_in(root, receipt)) == ["best pizza in chicago"]
    assert receipt.rows["labels_set_aside.near"] == receipt.rows["labels_set_aside"] == 2
    aside = output_table(open_storage(root), receipt, "set_aside").to_pylist()
    assert [(row["row"], row["reason"], row["text"]) for row in aside] == [(2, "label_near", rows[1][0]), (3, "label_near", rows[2][0])]


def test_labels_for_training_are_split_by_hash_and_share_no_query(ingest: Ingest, root: str, tmp_path: Path) -> None:
    lines = [f"q{i:04d}\tbrowse" for i in range(2000)]
    (tmp_path / "labels.tsv").write_text("query\tanswer\n" + "\n".join(lines) + "\n")
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.tsv"), labels_train_share=0.7)
    train, test = labels_in(root, receipt, "human_labels_train"), labels_in(root, receipt)
    assert not train.keys() & test.keys()
    assert len(train) + len(test) == 2000
    assert abs(len(train) / 2000 - 0.7) < 0.05
    (tmp_path / "labels.tsv").write_text("query\tanswer\n" + "\n".join(reversed(lines[:1000])) + "\n")
    fewer = ingest(LABELS_LOG, labels=str(tmp_path / "labels.tsv"), labels_train_share=0.7)
    assert labels_in(root, fewer, "human_labels_train").keys() == train.keys() & {f"q{i:04d}" for i in range(1000)}, (
        "a query keeps its side"
    )


def test_a_split_column_rules_and_test_rules_over_train(ingest: Ingest, root: str, tmp_path: Path) -> None:
    cells = [("a", "browse", "train"), ("b", "browse", "test"), ("C", "browse", "train"), ("c", "browse", "TEST"), ("d", "price", "dev")]
    (tmp_path / "labels.csv").write_text("query,answer,split\n" + "".join(",".join(row) + "\n" for row in cells))
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.csv"), labels_train_share=1.0)
    assert labels_in(root, receipt, "human_labels_train").keys() == {"a"}
    assert labels_in(root, receipt).keys() == {"b", "c"}
    assert receipt.rows["label_overlaps"] == 1
    assert aside(root, receipt) == [(5, "label_split")]


def test_complaints_are_no_sample_to_judge_by_but_may_train(ingest: Ingest, root: str, tmp_path: Path) -> None:
    cells = [
        ("a", "browse", "", "feedback"),
        ("b", "browse", "", "even"),
        ("c", "price", "train", " Feedback"),
        ("d", "price", "test", "feedback"),
    ]
    (tmp_path / "labels.csv").write_text("query,answer,split,design\n" + "".join(",".join(row) + "\n" for row in cells))
    receipt = ingest(LABELS_LOG, labels=str(tmp_path / "labels.csv"))
    assert labels_in(root, receipt).keys() == {"b"}
    assert labels_in(root, receipt, "human_labels_train").keys() == {"c"}
    assert aside(root, receipt) == [(1, "label_design"), (4, "label_design")]
    (tmp_path / "labels.csv").write_text("query,answer,design\na,browse,feedback\n")
    with pytest.raises(InputError, match="no human label can be used"):
        ingest(LABELS_LOG, labels=str(tmp_path / "labels.csv"))


def test_a_label_says_how_it_was_drawn(ingest: Ingest, root: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("query,answer,design,inclusion\na,browse,census,\nb,browse,,0.25\nc,price,random,\nd,price,,2\ne,price,,\n")
    receipt = ingest(LABELS_LOG, labels=str(path), labels_design="even")
    found = {row["query"]: (row["design"], row["inclusion"]) for row in table(root, receipt, "human_labels").to_pylist()}
    assert found == {"a": ("census", 1.0), "b": ("by_probability", 0.25), "e": ("even", None)}
    texts = table(root, receipt, "set_aside").to_pylist()
    assert [(row["row"], row["reason"]) for row in texts] == [(3, "label_design"), (4, "label_design")]
    assert "not one of even, by_traffic" in texts[0]["text"]
    assert "up to 1" in texts[1]["text"]
    thinned = ingest(LABELS_LOG, labels=str(path), labels_train_share=0.5)
    for row in (row for name in ("human_labels", "human_labels_train") for row in table(root, thinned, name).to_pylist()):
        assert (row["design"], row["inclusion"]) == {"a": ("by_probability", 0.5), "b": ("by_probability", 0.125)}.get(
            row["query"], ("unknown", None)
        )


@pytest.mark.parametrize(
    "log, fields, says",
    [
        ("Query,n\na,1\n", {}, ["no column 'query'", "it has Query, n", "did you mean 'Query'", "columns.query"]),
        ("query,n\na,1\n", {"columns": LogColumns(count="hits")}, ["no column 'hits'", "columns.count"]),
        ("query,day\na,1\n", {"columns": LogColumns(time="days")}, ["no column 'days'", "did you mean 'day'"]),
        ("query\n", {}, ["no rows"]),
        ("", {}, ["file is empty"]),
        ("query,n\na,x\nb,\n", {"columns": LogColumns(count="n")}, ["no row of the log can be used", "bad_count: 2", "whole numbers"]),
        ("query,n\na,x\n", {"columns": LogColumns(time="n")}, ["bad_time: 1", "ISO 8601"]),
        (
            "query,n\na,1,,\nb,2,,\n",
            {},
            ["bad_row: 2", "row 1 of log.csv", "4 cells, the header has 2: a,1,,", "number of cells", "`quotes`"],
        ),
        ("query,n\na\\x,1\n", {"quotes": "escaped"}, ["bad_row: 1", "backslashes that do not fit: a\\x,1"]),
        ("query\n \n  \n", {}, ["empty: 2", "row 1 of log.csv", "columns.query"]),
        ("query,n,time\na,1,2024-01-01\n", {"columns": TIMED}, ["covers 1 days", "2024-01-01 to 2024-01-01", "holdout_days"]),
        ("query,n\na,1\n", {"columns": LogColumns(labels="n")}, ["no human label can be used", "column n", "label_invalid"]),
        ("query\na\n", {"labels": "/nonexistent/labels.csv"}, ["labels file not found", "/nonexistent/labels.csv"]),
        ("query\na\n", {"log": "/nonexistent/log.csv"}, ["log file not found"]),
        ("query\na\n", {"log": ""}, ["no log is named"]),
    ],
)
def test_bad_input_says_what_where_and_what_to_do(ingest: Ingest, root: str, log: str, fields: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        ingest(log, **fields)
    assert all(text in str(error.value) for text in says), str(error.value)
    assert error.value.exit_code == 2
    store = open_storage(root)
    assert not store.exists("ingest/LATEST")
    assert not list(Path(root).rglob("receipt.json")), "nothing is published"


def test_a_file_of_labels_without_its_columns(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("query,label\na,browse\n")
    with pytest.raises(InputError, match="no column 'answer'") as error:
        ingest("query\na\n", labels=str(tmp_path / "labels.csv"))
    assert "rename the column" in str(error.value)


def test_a_full_disk_says_which(ingest: Ingest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headtail.stages.ingest.tally.keep_run", full)
    with pytest.raises(StorageError, match="no space left"):
        ingest("query\na\n")


def test_lost_events_end_the_job(ingest: Ingest, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(*arguments: Any) -> tally.CountedShard:
        shard = tally.finish_shard(*arguments)
        return shard._replace(queries=shard.queries.slice(1))

    monkeypatch.setattr("headtail.stages.ingest.counting.finish_shard", lossy)
    with pytest.raises(LedgerError, match="events do not add up"):
        ingest("query\na\nb\n", holdout_share=0.0)
    assert not open_storage(root).exists("ingest/LATEST")


DAYS_OF = st.lists(st.tuples(st.sampled_from([f"q{i}" for i in range(12)] + ["call <phone>"]), st.integers(0, 9)), min_size=1, max_size=80)


@given(DAYS_OF, st.integers(1, 5))
def test_the_history_is_what_later_days_brought_to_the_queries_of_each_day(events: list[tuple[str, int]], shards: int) -> None:
    """Against plain Python: cells of alike queries, and what came of them."""
    keys = {query: query_key(query) for query, _ in events}
    rows = [{"query_key": keys[query], "query": query, "day": day, "count": n} for (query, day), n in Counter(events).items()]
    table = pa.Table.from_pylist(rows, schema=tally.PART)
    rules = history.history_rules(Counter(day for _, day in events))
    ids = shards_of(table["query_key"], shards)
    pieces = [history.shard_history(tally.sum_days(table.filter(pa.array(ids == i))), rules) for i in range(shards)]
    found = {tuple(row.values())[:5]: (row["queries"], row["events"]) for row in history.merge_history(pieces).to_pylist()}
    days, expected = rules.days, Counter[Any]()
    for at, origin in enumerate(days):
        seen = {query: [days.index(d) for q, d in events if q == query and d <= origin] for query in keys}
        for query, past in seen.items():
            idle = bisect.bisect([1, 2, 4, 7, 14, 28], at - max(past)) if past else 0
            cell = (int(count_class(np.array([len(past)]))[0]), idle, "<" in query)
            day = (date(origin), date(origin), *cell)
            if past:
                expected[(*day, "queries")] += 1
                expected[(*day, "events")] += len(past)
            for later in days[at + 1 :]:
                if n := events.count((query, later)):
                    expected[(date(origin), date(later), *cell, "queries")] += 1
                    expected[(date(origin), date(later), *cell, "events")] += n
    if len(days) > 1:
        assert found == {name[:5]: (n, expected[(*name[:5], "events")]) for name, n in expected.items() if name[5] == "queries"}
    else:
        assert not found


def test_a_sample_of_light_queries_keeps_the_sums_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    ids = np.minimum(rng.zipf(1.3, 60_000), 20_000)
    rows = [
        {"query_key": query_key(str(q)), "query": str(q), "day": d, "count": 1}
        for q, d in zip(ids, rng.integers(0, 5, 60_000), strict=True)
    ]
    table = tally.sum_days(pa.Table.from_pylist(rows, schema=tally.PART))
    days = Counter(table["day"].to_pylist())
    whole = history.shard_history(table, history.history_rules(days))
    monkeypatch.setattr(history, "SAMPLE_ROWS", 4_000)
    rules = history.history_rules(days)
    part = history.shard_history(table, rules)
    assert rules.share <= 0.5
    for name in ("queries", "events"):
        assert pc.sum(part[name]).as_py() == pytest.approx(pc.sum(whole[name]).as_py(), rel=0.1)


def date(day: int) -> datetime.date:
    return datetime.date(1970, 1, 1) + datetime.timedelta(day)


def test_a_second_run_is_reused_and_a_changed_log_is_not(ingest: Ingest, root: str, tmp_path: Path) -> None:
    first = ingest("query\na\nb\n")
    assert ingest("query\na\nb\n").reused
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    (elsewhere / "log.csv").write_text("query\na\nb\n")
    assert ingest(elsewhere / "log.csv").fingerprint == first.fingerprint, "the same bytes elsewhere are the same log"
    assert ingest("query\na\nb\nb\n").fingerprint != first.fingerprint
    assert ingest("query\na\nb\n", shards=4, workers=1).reused, "how it is run is not what it is"
    assert ingest("query\na\nb\n", max_query_chars=100).fingerprint != first.fingerprint
    assert first.result.log[0].file == str(tmp_path / "log.csv")


def test_holdout_traffic_too_thin_to_trust_is_said(ingest: Ingest) -> None:
    log = "query,n,time\n" + "a,1000,2024-01-01\n" * 20 + "a,1,2024-01-02\n" * 11
    receipt = ingest(log, columns=TIMED)
    assert any("only 11 events" in note for note in receipt.notes)


def test_a_log_on_s3(s3_root: str, root: str) -> None:
    store = open_storage(s3_root)
    for i in range(2):
        store.replace(f"logs/day-{i}.csv", f"query,time\na,2024-01-0{i + 1}\nb,2024-01-0{i + 1}\n".encode())
    config = Config(root=root, log=f"{s3_root}/logs", task="query_intent", columns=LogColumns(time="time"), tracking=OFF)
    receipt = run(config)
    assert (receipt.rows["used_events"], receipt.rows["holdout_events"]) == (2, 2)
    assert run(config.model_copy(update={"log": f"{s3_root}/logs/*.csv"})).reused
    with pytest.raises(InputError, match="no log files"):
        run(config.model_copy(update={"log": f"{s3_root}/nothing/*.csv"}))


def test_merging_runs_sorts_by_count_then_key() -> None:
    rng = np.random.default_rng(0)
    keys = sorted(query_key(str(i)) for i in range(5000))
    whole = pa.table({"query_key": pa.array(keys, pa.binary(16)), "count": rng.zipf(1.6, 5000).clip(1, 10**6)})
    runs = []
    for part in np.array_split(np.arange(5000), 7):
        run = whole.take(pa.array(part))
        runs.append(run.take(pa.array(np.argsort(-run["count"].to_numpy(), kind="stable"))))
    for rows in (1, 100, 10**6):
        pieces = list(tally.merge_runs(runs, rows))
        found = pa.concat_tables(pieces).to_pylist()
        assert found == sorted(whole.to_pylist(), key=lambda row: (-row["count"], row["query_key"]))
        assert rows == 1 or max(map(len, pieces)) <= rows
    assert list(tally.merge_runs([])) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Four times the rows (and distinct queries) may not need twice the memory."""
    peaks = []
    for rows in (200_000, 800_000):
        path = tmp_path / f"{rows}.parquet"
        with pq.ParquetWriter(path, pa.schema([("query", pa.string())])) as writer:
            for start in range(0, rows, 100_000):
                writer.write_table(pa.table({"query": [f"some longer query text number {i}" for i in range(start, start + 100_000)]}))
        code = (
            "import resource, sys; from headtail.stages.ingest import *; from headtail.stages.ingest import tally, logfile\n"
            "from headtail.core.config import TrackingConfig\n"
            "tally.HELD_ROWS = logfile.BATCH_ROWS = 50_000\n"
            "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"run(Config(log={str(path)!r}, root={str(tmp_path / 'store')!r}, task='query_intent', shards={rows // 25_000},"
            " holdout_share=0.0, tracking=TrackingConfig(enabled=False)))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit(120))
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < 2 * peaks[0] + 30, f"{peaks} MiB"
