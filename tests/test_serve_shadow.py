"""Shadow mode: answers go out as ever, whatever becomes of the sample; what is asked is bounded by the day's budget and written."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fronts import Front
from headtail.adapters.storage import Storage, open_storage, read_table
from headtail.core.config import build_config
from headtail.core.errors import ConfigError, EngineError
from headtail.core.keys import query_key
from headtail.core.rows import SHADOW
from headtail.core.task import Task
from headtail.engines import open_engine
from headtail.releases import release
from headtail.releases.deletion import plan_deletion
from headtail.releases.overrides import tombstone_query
from headtail.stages import serve
from headtail.stages.serve import shadow_asker
from headtail.stages.serve.front.counters import Counters, create_counters, read_counters
from headtail.stages.serve.front.shadow_pipe import ShadowPipe
from headtail.stages.serve.metrics import prometheus_text
from headtail.stages.serve.shadow import ShadowConfig, ShadowSample, check_shadow
from headtail.stages.serve.shadow_asker import ShadowAsker, ShadowTable, day_cost, follow_pipe
from test_serve import published, says, segments

PRICED = {"model": "null", "engine": "null", "usd_per_million_tokens_in": 1000.0, "usd_per_million_tokens_out": 1000.0}
TODAY = datetime.date(2031, 1, 31)


def config(**options: Any) -> ShadowConfig:
    return build_config(
        ShadowConfig, {"model": PRICED, "share_hits": 1.0, "share_misses": 1.0, "usd_per_day": 1e6, **options}, where="test"
    )


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def front(store: Storage, tmp_path: Path, segmentation: Task) -> Front:
    published(store, tmp_path, segmentation)
    return Front(store, serve.Config(), tmp_path, says(segmentation, segments("rare")))


def samples(read: int) -> list[ShadowSample]:
    data = os.read(read, 1 << 20)
    return [ShadowSample(*msgspec.json.decode(line)) for line in data.splitlines()]


def sample(store: Storage, query: str, answer: Any, source: str = "realtime_student") -> ShadowSample:
    return ShadowSample(0, "00" * 10, query, release.current_id(store), source, False, False, json.dumps(answer), 0.5, {})


# ---- the front


def test_answers_of_every_way_are_sampled_with_their_side_inputs(front: Front, pipe: tuple[int, int]) -> None:
    front.app.shadow = ShadowPipe(pipe[1], config(), front.counters)
    side = {"businesses": ["Sushi Bar"]}
    asked = [front.ask("Pizza near ME").json(), front.ask("rare", side_inputs=side).json()]

    async def others() -> list[dict[str, Any]]:
        async with front.client() as http:
            many = (await http.post("/v1/answers", json={"queries": ["pizza near me", "rare too"]})).json()["answers"]
            chat = {"model": "query_segmentation", "messages": [{"role": "user", "content": "rare in chat"}]}
            return [*many, json.loads((await http.post("/v1/chat/completions", json=chat)).json()["choices"][0]["message"]["content"])]

    many = asyncio.run(others())
    found = samples(pipe[0])
    assert [one.query for one in found] == ["pizza near me", "rare", "pizza near me", "rare too", "rare in chat"]
    assert [one.cached for one in found] == [True, False, True, False, False]
    assert [json.loads(one.answer) for one in found] == [*(one["answer"] for one in (*asked, *many[:2])), many[2]]
    assert [one.side_inputs for one in found[:2]] == [{}, side]
    assert found[1].request_id == asked[1]["request_id"]


def test_hits_and_misses_have_shares_of_their_own(front: Front, pipe: tuple[int, int]) -> None:
    drawn = iter([0.29, 0.31, 0.59, 0.61])
    front.app.shadow = ShadowPipe(pipe[1], config(share_hits=0.3, share_misses=0.6), front.counters, lambda: next(drawn))
    for query in ("pizza near me", "pizza near me", "rare", "rare"):
        front.ask(query)
    assert [one.query for one in samples(pipe[0])] == ["pizza near me", "rare"]


def test_a_full_pipe_delays_nobody_and_is_counted(front: Front, pipe: tuple[int, int]) -> None:
    front.app.shadow = ShadowPipe(pipe[1], config(), front.counters)
    with contextlib.suppress(BlockingIOError):
        while True:  # nobody reads
            os.write(pipe[1], b"x" * 4096)
    assert front.ask("pizza near me").json()["source"] == "teacher"
    assert front.count("shadow_dropped") == 1
    os.read(pipe[0], 1 << 20)
    assert front.ask("too long for a line", side_inputs={"businesses": ["z" * 500] * 10}).json()["source"] == "realtime_student"
    assert front.count("shadow_dropped") == 2


# ---- the process that asks


@pytest.fixture
def current(store: Storage, tmp_path: Path, segmentation: Task) -> Storage:
    published(store, tmp_path, segmentation)
    return store


def test_rows_say_how_the_answers_agree_and_what_they_cost(current: Storage, tmp_path: Path) -> None:
    create_counters(tmp_path / "counters", 1)
    asker = ShadowAsker(current, config(), Counters(tmp_path / "counters", 0))
    [first] = asker.ask([sample(current, "rare ham", segments("rare ham", "location"))])
    same = json.loads(first["shadow"])
    rows = [first, *asker.ask([sample(current, "rare ham", same), sample(current, "pizza near me", segments("pizza"), "teacher")])]
    assert [row["state"] for row in rows] == ["answered"] * 3
    assert [row["agree"] for row in rows] == [False, True, False]
    assert rows[1]["score"] == 1.0
    assert all(len(row["answer_key"]) == 32 and row["tokens_in"] > 0 for row in rows)
    assert all(abs(row["usd"] - (row["tokens_in"] + row["tokens_out"]) / 1000) < 1e-9 for row in rows)
    table = ShadowTable(current, 60)
    table.add(rows)
    table.flush()
    [path] = [one.path for one in current.files("shadow")]
    assert read_table(current, path).schema.equals(SHADOW)
    assert day_cost(current, datetime.datetime.now(datetime.UTC).date()) == pytest.approx(sum(row["usd"] for row in rows))
    assert plan_deletion(current, "Rare ham").rows == {"shadow": 2}
    text = prometheus_text({"query_segmentation": read_counters(tmp_path / "counters")}).decode()
    assert 'headtail_shadow_compared_total{outcome="agree",source="realtime_student",task="query_segmentation"} 1.0' in text
    assert 'headtail_shadow_compared_total{outcome="differ",source="teacher",task="query_segmentation"} 1.0' in text
    assert 'headtail_shadow_asked_total{task="query_segmentation"} 3.0' in text


def test_a_query_that_was_deleted_while_its_row_waited_is_not_written(current: Storage) -> None:
    table = ShadowTable(current, 60)
    table.add(
        ShadowAsker(current, config()).ask([sample(current, query, segments(query)) for query in ("rare ham", "her name", "rare ham")])
    )
    tombstone_query(current, query_key("her name"), who="ada", why="she asked for it")
    table.flush()
    [path] = [one.path for one in current.files("shadow")]
    assert read_table(current, path)["query"].to_pylist() == ["rare ham"] * 2


def test_it_never_spends_more_than_the_days_budget_and_goes_on_the_next_day(current: Storage, tmp_path: Path) -> None:
    create_counters(tmp_path / "counters", 1)
    highest = config().price(config().model.max_model_len, 1000)  # more than any of these may cost
    days = [TODAY]
    asker = ShadowAsker(current, config(usd_per_day=3 * highest), Counters(tmp_path / "counters", 0), lambda: days[0])
    spent, asked = 0.0, 0
    for number in range(400):
        rows = asker.ask([sample(current, f"rare {number}", segments("rare"))] * 5)
        spent, asked = spent + sum(row["usd"] for row in rows), asked + len(rows)
    assert asked > 3
    assert spent <= 3 * highest
    assert read_counters(tmp_path / "counters").sums["shadow_dropped"] == 400 * 5 - asked
    assert asker.ask([sample(current, "rare", segments("rare"))]) == []
    days[0] += datetime.timedelta(1)
    assert len(asker.ask([sample(current, "rare", segments("rare"))])) == 1


def test_what_the_store_holds_of_the_day_counts(current: Storage) -> None:
    asker = ShadowAsker(current, config())
    table = ShadowTable(current, 60)
    table.add(asker.ask([sample(current, "rare", segments("rare"))] * 20))
    table.flush()
    assert len(ShadowAsker(current, config(usd_per_day=0.001)).ask([sample(current, "rare", segments("rare"))])) == 0


def test_a_query_whose_personal_data_was_taken_out_is_not_sent(current: Storage, tmp_path: Path) -> None:
    create_counters(tmp_path / "counters", 1)
    asker = ShadowAsker(current, config(), Counters(tmp_path / "counters", 0))
    some = [sample(current, query, segments("rare")) for query in ("mail <email> now", "rare")]
    assert [row["query"] for row in asker.ask(some)] == ["rare"]
    assert read_counters(tmp_path / "counters").sums["shadow_dropped"] == 1


def test_an_own_machine_is_priced_by_the_hour(current: Storage) -> None:
    model = {"model": "null:delay_us=20000", "engine": "null", "usd_per_hour": 3600.0}
    asker = ShadowAsker(current, config(model=model, usd_per_day=0.05))
    rows = asker.ask([sample(current, "rare", segments("rare"))] * 5)
    assert sum(row["usd"] for row in rows) > 0.09
    assert asker.ask([sample(current, "rare", segments("rare"))]) == []


def test_broken_rows_end_in_their_state_and_a_model_that_is_away_ends_nothing(
    current: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    create_counters(tmp_path / "counters", 1)
    counters = Counters(tmp_path / "counters", 0)
    asker = ShadowAsker(current, config(model={**PRICED, "model": "null:faults"}), counters)
    opens = list[int]()

    def open_late(*args: Any) -> Any:
        opens.append(1)
        if len(opens) > 1:
            return open_engine(*args)
        for query in ("rare", "x !fail", "x !length", "x !refuse", "x !invalid"):
            line = msgspec.json.encode(tuple(sample(current, query, segments("rare")))) + b"\n"
            os.write(write, line[:30])
            os.write(write, line[30:])
        os.close(write)
        raise EngineError("the endpoint is away")

    monkeypatch.setattr(shadow_asker, "open_engine", open_late)
    monkeypatch.setattr(shadow_asker, "_PAUSE_S", 0.01)
    os.write(write, msgspec.json.encode(tuple(sample(current, "first", segments("rare")))) + b"\n")
    table = ShadowTable(current, 60)
    follow_pipe(read, asker, table, counters)
    os.close(read)
    assert read_counters(tmp_path / "counters").sums["shadow_dropped"] == 1
    assert [row["state"] for row in table._rows] == ["answered", "failed", "truncated", "refused", "invalid"]
    assert [row["agree"] for row in table._rows][1:] == [None] * 4


def test_a_budget_needs_a_price(root: str) -> None:
    assert not ShadowConfig().is_on
    check_shadow(ShadowConfig())
    with pytest.raises(ConfigError, match="a budget a day needs the model's price"):
        check_shadow(config(model={"model": "m", "engine": "openai", "base_url": "http://127.0.0.1:1/v1"}))
    assert open_storage(root).root
