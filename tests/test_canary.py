"""A canary gets its share, the same queries always; it is taken back when proven worse, held while undecided, promoted when proven fine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.adapters.storage import Storage, open_storage
from headtail.cli.release import parse_share
from headtail.core.errors import ConfigError, GateRejected, InputError
from headtail.core.keys import query_key
from headtail.core.sequential import Watch
from headtail.core.task import Task
from headtail.releases import canary, garbage, release
from headtail.releases.canary import ArmCounts, CanaryPolicy, CanaryRecord, CanaryWatcher, SeenQueries, assign, canary_verdict, read_canary
from test_releases import make

KEYS = [query_key(f"query {i}") for i in range(4000)]
GOOD = ArmCounts(queries=1900, errors=19, degraded=38, slow=5)


@pytest.fixture
def two(store: Storage, tmp_path: Path, intent: Task) -> tuple[str, str]:
    """The current release and another one."""
    a, b = (make(store, tmp_path, intent, name).id for name in "ab")
    release.promote(store, a)
    return a, b


def begin(store: Storage, new: str, share: float = 0.05, **policy: int | bool) -> CanaryRecord:
    return canary.start_canary(store, new, share, who="ada", policy=CanaryPolicy.model_validate(policy))


def watcher(store: Storage, save_seconds: float = 0) -> CanaryWatcher:
    return CanaryWatcher(store, save_seconds, np.random.default_rng(1))


def test_the_split_is_sticky_about_as_large_as_asked_and_grows_without_moving_anyone(store: Storage, two: tuple[str, str]) -> None:
    record = begin(store, two[1])
    mine = {key for key in KEYS if assign(record, key) == two[1]}
    assert 0.03 < len(mine) / len(KEYS) < 0.07
    assert {assign(record, key) for key in KEYS} == set(two)
    wider = begin(store, two[1], 0.25)
    assert (wider.action, wider.salt) == ("share", record.salt)
    assert mine < {key for key in KEYS if assign(wider, key) == two[1]}
    canary.stop_canary(store, who="ada")
    again = begin(store, two[1])
    other = {key for key in KEYS if assign(again, key) == two[1]}
    assert len(mine & other) < len(mine) / 2, "another canary has another split"


def test_without_a_canary_or_after_it_all_queries_meet_the_current_release(store: Storage, two: tuple[str, str]) -> None:
    assert assign(None, KEYS[0], "feed") == "feed"
    assert read_canary(store) is None
    record = begin(store, two[1], 0.99)
    assert assign(record, KEYS[0], two[1]) == two[1], "CURRENT moved: the canary is over"
    ended = canary.stop_canary(store, who="ada", why="enough; ask jo@example.com")
    assert ended.why == "enough; ask <email>"
    assert {assign(ended, key, two[0]) for key in KEYS[:50]} == {two[0]}
    with pytest.raises(InputError, match="no canary runs"):
        canary.stop_canary(store, who="ada")


def test_news_cost_one_look(store: Storage, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    record = begin(store, two[1])
    looks: list[str] = []

    def look(self: Storage, path: str) -> bool:
        looks.append(path)
        return False

    monkeypatch.setattr(type(store), "exists", look)
    assert read_canary(store, record) == record
    assert looks == ["releases/canary/00000002.json"]


def test_a_worse_canary_is_taken_back_by_itself(store: Storage, two: tuple[str, str]) -> None:
    record, watching = begin(store, two[1]), watcher(store)
    windows = 0
    while record.state == "running" and windows < 100:
        record = watching.add(record, GOOD, ArmCounts(queries=100, errors=4, degraded=2))
        windows += 1
    assert (record.state, record.action, record.worse) == ("returned", "return", ("errors",))
    assert 5 <= windows < 60
    assert read_canary(store) == record
    assert {assign(record, key, two[0]) for key in KEYS[:50]} == {two[0]}
    assert canary_verdict(record).word == "worse"
    with pytest.raises(InputError, match="no canary runs"):
        canary.promote_canary(store, who="ada", accept_undecided=True)
    assert watching.add(record, GOOD, GOOD).state == "returned"


def test_a_proof_waits_for_the_minimum_of_queries(store: Storage, two: tuple[str, str]) -> None:
    record, watching = begin(store, two[1], min_queries=500), watcher(store)
    for window in range(1, 6):
        record = watching.add(record, GOOD, ArmCounts(queries=100, errors=100))
        assert record.worse == ("errors",)
        assert record.state == ("running" if window < 5 else "returned")


def test_no_data_is_not_success_and_undecided_holds_the_share(store: Storage, two: tuple[str, str]) -> None:
    record, watching = begin(store, two[1], judged=True), watcher(store)
    verdict = canary_verdict(record)
    assert verdict.word == "undecided"
    assert verdict.reasons == ("0 of at least 500 queries", "errors: no data", "degraded: no data", "slow: no data", "judged: no data")
    with pytest.raises(GateRejected, match="this canary is undecided: 0 of at least"):
        canary.promote_canary(store, who="ada")
    for _ in range(30):
        record = watching.add(record, GOOD, ArmCounts(queries=100, errors=1, degraded=2))
    assert record.state == "running"
    assert canary_verdict(record).reasons == ("judged: no data",)
    good = ArmCounts(queries=100, errors=1, degraded=2, judged=(0.1,) * 100)
    for _ in range(30):
        record = watching.add(record, GOOD.model_copy(update={"judged": (0.1,) * 200}), good)
    assert canary_verdict(record).word == "fine"
    assert canary.promote_canary(store, who="ada").state == "promoted"
    assert release.current_id(store) == two[1]
    assert not canary.is_running(store, read_canary(store))


def test_a_person_may_promote_what_is_undecided_but_not_what_is_worse(store: Storage, two: tuple[str, str]) -> None:
    begin(store, two[1])
    assert canary.promote_canary(store, who="ada", accept_undecided=True).why.startswith("undecided: 0 of at least")
    record = begin(store, two[0])
    worse = record.model_copy(update={"watches": {"slow": Watch(pairs=9, is_worse=True)}})
    assert canary_verdict(worse).word == "worse"


def test_what_cannot_be_a_canary_is_refused(store: Storage, two: tuple[str, str], tmp_path: Path, intent: Task, segmentation: Task) -> None:
    other = make(store, tmp_path, segmentation, "c").id
    for name, share, message in (
        (two[0], 0.05, "this release is the current one"),
        (other, 0.05, "of task query_segmentation"),
        (two[1], 1.0, "below 100 %"),
    ):
        with pytest.raises(ConfigError, match=message):
            canary.start_canary(store, name, share, who="ada")
    begin(store, two[1])
    third = make(store, tmp_path, intent, "d").id
    with pytest.raises(ConfigError, match="another canary runs"):
        begin(store, third)
    release.promote(store, third)
    assert begin(store, two[1]).champion == third, "CURRENT moved: the canary before is over"


def test_two_watchers_add_to_one_state(store: Storage, two: tuple[str, str]) -> None:
    record = begin(store, two[1])
    watchers = [watcher(store) for _ in range(3)]

    def work(one: CanaryWatcher) -> None:
        for _ in range(5):
            one.add(record, GOOD, ArmCounts(queries=100, errors=1))

    threads = [threading.Thread(target=work, args=(one,)) for one in watchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = read_canary(store)
    assert held is not None
    assert held.queries == (15 * 1900, 15 * 100)
    assert held.watches["errors"].pairs == 15 * 100


def test_a_quiet_watch_is_written_seldom_and_loses_nothing(store: Storage, two: tuple[str, str]) -> None:
    record, watching = begin(store, two[1]), watcher(store, save_seconds=3600)
    for _ in range(3):
        record = watching.add(record, GOOD, ArmCounts(queries=10))
    held = read_canary(store)
    assert held is not None
    assert (held.number, held.queries) == (1, (0, 0))
    wider = begin(store, two[1], 0.5)  # somebody changes the share meanwhile
    watching.add(wider, GOOD, ArmCounts(queries=10))
    saved = watching.save()
    assert (saved.queries, saved.share, saved.number) == ((4 * 1900, 40), 0.5, 3)


def test_the_canary_s_snapshot_is_not_collected(store: Storage, two: tuple[str, str]) -> None:
    held = release.load_release(store, two[1]).snapshot
    assert held not in garbage.needed_snapshots(store, 1)
    begin(store, two[1])
    assert garbage.needed_snapshots(store, 1)[held] == f"of release {two[1]}, the canary"


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=200))
def test_a_query_counts_once(keys: list[bytes]) -> None:
    seen = SeenQueries()
    counted = [key for key in keys if seen.add(key)]
    assert len(counted) == len(set(counted)) <= len(set(keys))
    assert not any(seen.add(key) for key in keys)


def test_seen_queries_may_lie_in_shared_memory() -> None:
    shared = bytearray(64)
    assert SeenQueries(memoryview(shared)).add(KEYS[0])
    assert not SeenQueries(memoryview(shared)).add(KEYS[0])
    with pytest.raises(ValueError, match="power of two"):
        SeenQueries(bytearray(3))


@pytest.mark.parametrize("text, share", [("5%", 0.05), ("0.5 %", 0.005), ("0.05", 0.05), ("0%", 0.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)
    for wrong in ("100%", "-1%", "five", "5"):
        with pytest.raises(ConfigError, match="not a share"):
            parse_share(wrong)


def test_the_commands(store: Storage, two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    from headtail.cli import main

    at = ["--root", store.root]
    main(["release", "create", "--student", "none", "--why", "a trial", "--json", *at])
    assert '"note":"a trial"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["release", "create", "--snapshot", two[1], *at])
    assert "this snapshot is of another task" in capsys.readouterr().err  # as the hand-made one says
    main(["release", "status", *at])
    assert "none was ever begun" in capsys.readouterr().out
    main(["release", "canary", "5%", "--release", two[1], "--who", "ada", "--why", "new words", *at])
    assert "3,179 where 1% is usual" in capsys.readouterr().err
    main(["release", "canary", "25%", *at])
    main(["status", "--json", *at])
    assert json.loads(capsys.readouterr().out)["canary"] == {"release": two[1], "share": 0.25, "verdict": "undecided"}
    main(["release", "status", *at])
    shown = capsys.readouterr().out
    assert "undecided: the share is held" in shown
    assert "0 of at least 500 queries" in shown
    with pytest.raises(SystemExit):
        main(["release", "promote", *at])
    assert "this canary is undecided" in capsys.readouterr().err
    main(["release", "promote", "--accept-undecided", *at])
    assert release.current_id(store) == two[1]
    main(["release", "rollback", *at])
    assert release.current_id(store) == two[0]
    main(["release", "promote", two[1], *at])
    assert release.current_id(store) == two[1]


def test_on_s3(s3_root: str, tmp_path: Path, intent: Task) -> None:
    store = open_storage(s3_root)
    a, b = (make(store, tmp_path, intent, name).id for name in "ab")
    release.promote(store, a)
    record = watcher(store).add(begin(store, b), GOOD, ArmCounts(queries=100))
    assert read_canary(store) == record
    assert canary.stop_canary(store, who="ada").state == "stopped"
