"""A person's answer outranks every model's: at once for servers, in the next snapshot, until it ends or is taken back."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from headtail.adapters.storage import LocalStorage, Storage, open_storage
from headtail.cache.snapshot import StoredAnswer
from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import query_key
from headtail.core.rows import Source
from headtail.core.task import Task
from headtail.releases import lookup, overrides, release
from headtail.releases.overrides import Overrides, load_overrides
from headtail.review.decision import Decision
from headtail.review.log import DecisionLog
from test_cache import answers, good, publish
from test_publish_guardrails import answered, log, published, spans

TEACHER = StoredAnswer("teacher", 0.9, bytes(16), b"{}")
PIZZA = query_key("pizza")


@pytest.fixture
def released(store: Storage, tmp_path: Path, segmentation: Task) -> Storage:
    """A store whose current release answers `pizza` and `sushi`."""
    _, manifest = publish(store, tmp_path, answers(good("pizza", spans("pizza"))), answers(good("sushi", spans("sushi"))))
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=segmentation).id)
    return store


def put(store: Storage, query: str = "Pizza ", *texts: str, **options: str | bool) -> overrides.OverrideEntry:
    said = {"who": "ada", "why": "wrong city", **options}
    return overrides.set_override(store, query, spans(*(texts or ("pizza",))), **said)  # type: ignore[arg-type]


def test_it_is_served_to_any_spelling_of_the_query_and_known_by_its_source(released: Storage) -> None:
    entry = put(released)
    found = load_overrides(released).resolve(PIZZA, TEACHER)
    assert found is not None
    assert (found.source, found.plain_answer()) == (Source.HUMAN_OVERRIDE, json.loads(spans("pizza")))
    assert load_overrides(released).resolve(query_key("sushi"), TEACHER) == TEACHER
    shown = lookup.look_up(released, "PIZZA")
    assert (shown["source"], shown["answer_key"]) == ("human_override", found.answer_key.hex())
    assert (entry.query, entry.who, entry.number) == ("pizza", "ada", 1)


def test_a_look_for_news_is_one_look_at_the_store(released: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        put(released, f"pizza {i}", f"pizza {i}")
    known = load_overrides(released, "query_segmentation")
    looks: list[str] = []
    exists = LocalStorage.exists

    def look(self: LocalStorage, path: str) -> bool:
        looks.append(path)
        return exists(self, path)

    monkeypatch.setattr(type(released), "exists", look)
    monkeypatch.setattr(type(released), "files", lambda self, folder: pytest.fail("a folder was listed"))
    again = load_overrides(released, "query_segmentation", known)
    assert looks == ["overrides/00000006.json"]
    assert again.answers == known.answers
    put(released, "sushi", "sushi")
    assert len(load_overrides(released, "query_segmentation", again)) == 6


def test_it_ends_and_what_the_snapshot_had_is_served_again(released: Storage) -> None:
    entry = put(released, until="2099-05-05")
    assert entry.until == "2099-05-06T00:00:00+00:00", "a day is its end"
    known = load_overrides(released)
    assert known.resolve(PIZZA, TEACHER) != TEACHER
    later = datetime.datetime(2099, 5, 6, tzinfo=datetime.UTC)
    ended = load_overrides(released, None, known, later)
    assert ended.resolve(PIZZA, TEACHER) == TEACHER
    baked = known.answers[PIZZA]
    assert ended.resolve(PIZZA, baked) is None, "a snapshot that holds it does not bring it back"
    for wrong in ("2001-01-01", "soon"):
        with pytest.raises(ConfigError, match="--until"):
            put(released, until=wrong)


def test_it_is_taken_back_and_a_correction_of_the_review_queue_stays(released: Storage) -> None:
    baked = load_overrides(released, None, None).resolve(PIZZA, None)
    assert baked is None
    put(released)
    first = load_overrides(released).answers[PIZZA]
    put(released, "pizza", "Pizza")
    overrides.remove_override(released, "pizza", who="bob", why="was right")
    now = load_overrides(released)
    assert now.resolve(PIZZA, TEACHER) == TEACHER
    assert now.resolve(PIZZA, first) is None, "also not an earlier one that a snapshot still holds"
    reviewed = StoredAnswer("human_override", None, overrides.override_key("query_segmentation", "pizza", spans("pizza"), "review"), b"{}")
    assert now.resolve(PIZZA, reviewed) == reviewed
    assert overrides.standing_overrides(released, "query_segmentation") == []
    with pytest.raises(InputError, match="no override stands"):
        overrides.remove_override(released, "pizza", who="bob", why="")


def test_it_is_checked_and_a_person_may_outrank_a_guardrail(released: Storage) -> None:
    with pytest.raises(ConfigError, match="a guardrail refuses this answer: span_not_in_query"):
        put(released, "pizza", "pizza", "denver")
    assert put(released, "pizza", "pizza", "denver", despite_guardrails=True).outranks == "span_not_in_query"
    with pytest.raises(ConfigError, match="cannot be served: schema: segments"):
        overrides.set_override(released, "pizza", '{"segments":[{"text":"pizza","label":"dish"}]}', who="a", why="b")
    for who, why in (("", "b"), ("a", " ")):
        with pytest.raises(ConfigError, match=r"who|why"):
            overrides.set_override(released, "pizza", spans("pizza"), who=who, why=why)
    with pytest.raises(ConfigError, match="the query is empty"):
        put(released, " \u200b ")


def test_somebody_s_answer_is_not_everybody_s(released: Storage, segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are one once personal data is taken out: `mail <email>` is asked by everybody."""
    mail = query_key("mail <email>")
    for query in ("mail ada@example.com", "Mail <EMAIL>"):
        for sure in (False, True):
            with pytest.raises(ConfigError, match="everybody who asks") as refused:
                put(released, query, "mail", despite_guardrails=sure)
            assert "ada@" not in str(refused.value)
    shared = segmentation.file.model_copy(update={"redacted": "cached"})
    before = release.current_id(released)
    cached = release.make_release(
        released, snapshot=release.current_release(released).snapshot, task=dataclasses.replace(segmentation, file=shared)
    )
    release.promote(released, cached.id)
    entry = put(released, "mail ada@example.com", "mail", "<email>", why="Ada@Example.com asked")
    assert (entry.query, entry.why) == ("mail <email>", "<email> asked")
    assert lookup.look_up(released, "mail bob@example.com")["source"] == "human_override"
    release.promote(released, before)  # the entry is in the store, the task is not of that mind any more
    assert not lookup.look_up(released, "mail bob@example.com")["cached"]
    assert load_overrides(released).resolve(mail, TEACHER) == TEACHER
    overrides.remove_override(released, "mail ada@example.com", who="ada", why="")


def test_an_answer_with_personal_data_is_not_kept(released: Storage) -> None:
    with pytest.raises(ConfigError, match="which is not kept") as refused:
        put(released, "pizza", "pizza", "ADA@example.com", despite_guardrails=True)
    assert "ada@" not in str(refused.value).lower()
    assert not released.exists("overrides/00000001.json")


def test_a_tombstone_hides_a_query_from_every_cache_and_holds_no_text(released: Storage) -> None:
    put(released)
    known = load_overrides(released)
    overrides.tombstone_query(released, PIZZA, who="ada", why="asked for")
    now = load_overrides(released, None, known)
    assert now.resolve(PIZZA, TEACHER) is None
    assert not lookup.look_up(released, "pizza")["cached"]
    assert overrides.erase_overrides(released, [PIZZA]) == 1
    assert all(b"pizza" not in released.read(f"overrides/{n:08}.json") for n in (1, 2))
    assert load_overrides(released).deleted == {PIZZA}
    assert load_overrides(released, "other task").deleted == {PIZZA}
    put(released)  # a person may answer it anew
    assert load_overrides(released).resolve(PIZZA, None) is not None


def test_overrides_are_of_their_task(released: Storage) -> None:
    put(released)
    assert load_overrides(released, "query_intent").answers == {}
    other = load_overrides(released, "query_intent", load_overrides(released))
    assert (other.task, other.answers, other.number) == ("query_intent", {}, 1)


def test_without_any_nothing_changes(store: Storage) -> None:
    empty = load_overrides(store, "query_segmentation")
    assert (len(empty), empty.resolve(PIZZA, TEACHER)) == (0, TEACHER)
    assert not Overrides()


def test_people_s_answers_are_the_highest_source_of_a_snapshot(store: Storage, root: str, segmentation: Task) -> None:
    inputs = {"log": log(store).path}
    pairs = {q: spans(q) for q in ("pizza", "denver", "hotel", "sushi")}
    rows = answered(store, segmentation, "a" * 16, "teacher", inputs, *pairs.items())
    first = published(root, "query_segmentation", rows)
    keys = {row["query"]: row["answer_key"] for row in rows_of(store, first.result.snapshot)}
    put(store, "pizza", "pizza", "denver", despite_guardrails=True)
    put(store, "new one", "new one")
    put(store, "denver", "denver", until="2099-01-01")
    moment = "2026-01-01T00:00:00.000+00:00"
    decided = [
        Decision(query_key("hotel"), "hotel", "correct", spans("hotel "), spans("hotel"), keys["hotel"], "ada", moment, ""),
        Decision(query_key("sushi"), "sushi", "drop", None, spans("sushi"), keys["sushi"], "ada", moment, ""),
    ]
    DecisionLog(store, "query_segmentation").record(decided, "page")
    second = published(root, "query_segmentation", rows)
    assert (second.reused, second.rows["published.human_override"], second.rows["left_out.dropped"]) == (False, 3, 1)
    held = {row["query"]: (row["source"], row["count"]) for row in rows_of(store, second.result.snapshot)}
    assert held == {
        "pizza": ("human_override", 50),
        "new one": ("human_override", None),
        "hotel": ("human_override", 1),
        "denver": ("teacher", 1),  # an override that ends is laid over the snapshot, never written into it
    }
    assert published(root, "query_segmentation", rows).reused
    overrides.tombstone_query(store, query_key("denver"), who="a", why="b")
    third = published(root, "query_segmentation", rows)
    assert third.rows["left_out.deleted"] == 1
    assert "denver" not in {row["query"] for row in rows_of(store, third.result.snapshot)}


def rows_of(store: Storage, snapshot: str) -> list[dict[str, Any]]:
    from headtail.adapters.storage import read_table

    return list(read_table(store, f"snapshots/{snapshot}/answers.parquet").to_pylist())


def test_on_s3(s3_root: str, tmp_path: Path, segmentation: Task) -> None:
    store = open_storage(s3_root)
    _, manifest = publish(store, tmp_path, answers(good("pizza", spans("pizza"))))
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=segmentation).id)
    put(store)
    known = load_overrides(store)
    put(store, "sushi", "sushi")
    assert len(load_overrides(store, None, known).answers) == 2


def test_the_command_sets_lists_exports_and_removes(released: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from headtail.cli import main

    at = ["--root", released.root]
    main(["override", "pizza", spans("pizza"), "--who", "ada", "--why", "denver is wrong", "--json", *at])
    assert json.loads(capsys.readouterr().out)["answer"] == spans("pizza")
    main(["override", "--list", *at])
    assert "denver is wrong" in capsys.readouterr().out
    main(["override", "--export", str(tmp_path / "held.jsonl"), *at])
    assert json.loads((tmp_path / "held.jsonl").read_text())["who"] == "ada"
    main(["override", "pizza", "--remove", *at])
    capsys.readouterr()
    main(["override", "--list", "--json", *at])
    assert json.loads(capsys.readouterr().out) == []
    for wrong in (["pizza"], ["pizza", "{}", "--remove"], []):
        with pytest.raises(SystemExit):
            main(["override", *wrong, *at])
        assert "give a query and an answer" in capsys.readouterr().err
