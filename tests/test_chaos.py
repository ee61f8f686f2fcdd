"""The crash harness in small, and whether it would see it if something were lost: it is shown stores that were damaged on purpose."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chaos import __main__ as command
from chaos import harness, kinds, report
from chaos.bench import Bench, Lab
from chaos.events import Account, Event, account
from chaos.harness import NULL, Harness, Kind, Tally, cannot
from chaos.spec import DONE
from chaos.verify import Findings, Tree, check_files, check_rows, named_files, reachable


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("chaos"), seed=1) as made:
        yield made


@pytest.fixture(scope="module")
def finished(lab: Lab) -> Bench:
    """A job that went well."""
    bench = Bench(lab, "finished/0")
    bench.make(bench.rows(60))
    assert bench.go() == DONE, bench.said
    return bench


# --- would it see it?


class Store:
    """A copy of a finished store, to be damaged."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        import shutil

        shutil.copytree(bench.root, folder)
        self.root, self.bench = folder, bench
        self.receipt = folder / Path(folder / "precompute/LATEST").read_text() / "receipt.json"

    def look(self) -> Findings:
        found, tree = Findings(), Tree(str(self.root), {})
        check_files(tree, found)
        check_rows(tree, self.bench.expected, found, echo=True)
        return found

    def answers(self) -> Path:
        """The file of the first shard's answers."""
        outputs = json.loads(self.receipt.read_text())["outputs"]
        return self.root / next(str(ref["path"]) for name, ref in sorted(outputs.items()) if name.startswith("answers/"))

    def rewrite(self, change: Callable[[pa.Table], pa.Table]) -> None:
        """Other rows in the first file of answers, and receipts that say that this is how it should be: a lie without a seam."""
        import hashlib

        path = self.answers()
        before = path.read_bytes()
        table = change(pq.read_table(io.BytesIO(before)))
        pq.write_table(table, path)
        after = path.read_bytes()
        for file in self.root.rglob("*.json"):
            text = file.read_text()
            value = json.loads(text)
            for ref in named_files(value):
                if ref["sha256"] == hashlib.sha256(before).hexdigest():
                    ref.update(sha256=hashlib.sha256(after).hexdigest(), bytes=len(after), rows=table.num_rows)
            file.write_text(json.dumps(value))
        for file in self.root.rglob("*.json"):  # what named one of these by its digest
            for ref in named_files(value := json.loads(file.read_text())):
                if ref["path"].endswith(".json"):
                    data = (self.root / ref["path"]).read_bytes()
                    ref.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
            file.write_text(json.dumps(value))


@pytest.fixture
def damaged(finished: Bench, tmp_path: Path) -> Store:
    return Store(finished, tmp_path / "store")


def test_a_whole_store_has_nothing_wrong(damaged: Store) -> None:
    found = damaged.look()
    assert (found.bad, found.rows, found.problems) == (0, 60, [])
    names = reachable(Tree(str(damaged.root), {}))
    assert any(name.startswith("precompute/") and "/shards/" in name for name in names)
    assert not any("/work/" in name for name in names), "work of a finished job is read by nobody"


def test_a_deleted_row_is_missing(damaged: Store) -> None:
    damaged.rewrite(lambda table: table.slice(1))
    found = damaged.look()
    assert (found.missing, found.duplicated, found.unasked, found.unreadable) == (1, 0, 0, 0)


def test_a_doubled_row_is_duplicated(damaged: Store) -> None:
    damaged.rewrite(lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    found = damaged.look()
    assert (found.missing, found.duplicated, found.unreadable) == (0, 1, 0)


def _column(table: pa.Table, name: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(at), pa.array(change(table[name].to_pylist()), table.schema.field(at).type))


def test_a_stranger_is_unasked_and_the_row_it_replaced_is_missing(damaged: Store) -> None:
    damaged.rewrite(lambda table: _column(table, "query", lambda queries: ["never asked", *queries[1:]]))
    found = damaged.look()
    assert (found.missing, found.unasked) == (1, 1)


def test_another_rows_answer_is_wrong(damaged: Store) -> None:
    damaged.rewrite(lambda table: _column(table, "answer", lambda answers: [answers[1], answers[0], *answers[2:]]))
    found = damaged.look()
    assert (found.wrong, found.missing) == (2, 0)


def test_a_wrong_state_is_wrong(damaged: Store) -> None:
    damaged.rewrite(lambda table: _column(table, "state", lambda states: ["failed", *states[1:]]))
    assert damaged.look().wrong == 1


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_file_that_is_not_what_its_digest_says_is_unreadable(damaged: Store, how: str) -> None:
    path = damaged.answers()
    data = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(data[:-10] if how == "cut" else data[:40] + b"!" + data[41:])
    found = damaged.look()
    assert found.unreadable == 1  # named by two receipts, told once
    assert path.name in found.problems[0]


def test_a_receipt_that_is_not_json_is_unreadable(damaged: Store) -> None:
    shard = next(path for path in damaged.root.rglob("shards/*.json"))
    shard.write_text(shard.read_text()[:100])
    assert damaged.look().unreadable == 1


def test_no_receipt_means_that_all_rows_are_missing(damaged: Store) -> None:
    damaged.receipt.unlink()
    assert damaged.look().missing == 60


def test_a_run_after_success_that_asks_or_changes_something_is_seen(lab: Lab) -> None:
    bench = Bench(lab, "again/0")
    bench.make(bench.rows(20))
    assert bench.go() == DONE, bench.said
    receipt = Path(bench.root, Path(bench.root, "precompute/LATEST").read_text(), "receipt.json")
    text = receipt.read_text()
    plain = bench.go

    def go(*args: Any, **options: Any) -> int:
        code = plain(*args, **options)
        bench.note_kill(1, "query", kind="a")  # as if a row had been asked
        receipt.write_text(text + " ")
        return code

    bench.go = go  # type: ignore[method-assign]
    found = bench.check()
    assert found.changed == 2
    assert "asked 1 rows and changed" in found.problems[-1]


# --- what a kill cost


def test_what_was_asked_twice_is_counted_against_the_kill_that_followed() -> None:
    events = [
        Event(0.0, 1, "s", ""),
        *(
            Event(at, 1, kind, row)
            for at, kind, row in [(0.1, "a", "x"), (1.0, "d", "x"), (1.1, "a", "y"), (3.0, "d", "y"), (3.1, "a", "z")]
        ),
        Event(5.0, 1, "k", "killed"),  # x was safe; y was done but not safe; z was being asked
        Event(9.0, 2, "s", ""),
        *(Event(at, 2, kind, row) for at, kind, row in [(9.1, "a", "y"), (10.0, "d", "y"), (10.1, "a", "z"), (11.0, "d", "z")]),
    ]
    found = account(events)
    assert found.rows == 1
    assert found.lost == pytest.approx([2.0 + 2.0])
    assert found.idle == pytest.approx([4.1])
    assert account(events[:6]).rows == 0


def test_a_row_that_ended_in_an_error_and_is_asked_again_repeats_nothing() -> None:
    events = [Event(0, 1, "s", ""), Event(0, 1, "a", "x"), Event(1, 1, "e", "x"), Event(1, 1, "a", "x"), Event(2, 1, "d", "x")]
    assert account(events) == Account()


# --- what is told


def test_a_job_that_does_not_hold_fails_the_run_and_says_how_to_see_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lossy(bench: Bench, left: int) -> None:
        kinds.commit(bench, 1)
        bench.expected["a query that nobody answered"] = frozenset({"answered"})

    monkeypatch.setitem(harness.ENGINES, "null", (Kind("commit.disk", lossy, 1.0, "loses a row"),))
    out = tmp_path / "chaos.json"
    code = command.main(["--kills", "1", "--seed", "3", "--out", str(out), "--folder", str(tmp_path / "stores")])
    found = json.loads(out.read_text())
    assert (code, found["held"], found["total"]["missing"], found["seed"]) == (1, False, 1, 3)
    (failure,) = found["failures"]
    assert failure["reproduce"] == "python -m tests.chaos --engine null --seed 3 --only commit.disk/0 --left 1"
    assert Path(failure["kept"], "store").is_dir(), "the store of a failed job is kept"
    assert "a query that nobody answered" in capsys.readouterr().err


def test_a_kill_that_costs_more_than_the_limit_does_not_hold() -> None:
    tally = Tally(NULL[0], 1, kills=1, lost=[harness.LIMIT_S + 1])
    assert not report.held([tally])
    assert report.held([Tally(NULL[0], 1, kills=1, lost=[harness.LIMIT_S])])


def test_shares_sum_to_one_and_names_are_unique() -> None:
    for every in harness.ENGINES.values():
        assert sum(kind.share for kind in every if kind.kills) == pytest.approx(1.0, abs=0.01)
        assert len({kind.name for kind in every}) == len(every)


def test_help_lists_and_unknown_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert "twin.s3" in capsys.readouterr().out
    assert command.main(["--only", "nothing"]) == 2


# --- the harness in small


def _held(lab: Lab, name: str, kills: int) -> Tally:
    kind = next(kind for kind in NULL if kind.name == name)
    if why := cannot(kind):
        pytest.skip(why)
    (tally,) = Harness(lab, [kind], kills, lambda _: None).run()
    assert not tally.bad, tally.failures
    return tally


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kills",
    [
        ("commit.disk", 6),
        ("commit.s3", 3),
        ("timed.disk", 3),
        ("short.disk", 2),
        ("twin.disk", 2),
        ("again.disk", 2),
        ("again.s3", 2),
        ("later.s3", 2),
        ("full.disk", 2),
        ("tmpfs.disk", 1),
        ("poison.disk", 1),
        ("hang.disk", 1),
        ("endpoint.disk", 1),
    ],
)
def test_without_a_cluster(lab: Lab, name: str, kills: int) -> None:
    tally = _held(lab, name, kills)
    assert tally.struck >= kills
    assert tally.rows >= kinds.ROWS


@pytest.mark.slow
def test_on_a_cluster(lab: Lab) -> None:
    """A real Ray cluster: its actor is killed and comes back, then its driver, and another goes on."""
    tally = _held(lab, "mixed.disk", 2)
    assert tally.kills == 2
    assert not [left for left in lab.left_behind if "Worker" in left], "a worker outlived its cluster"
