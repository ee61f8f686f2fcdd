"""Sealed rows and open rows share no question: near-duplicates are sealed together, whoever knows one of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.core.keys import query_key
from headtail.core.leaks import LabelledQueries
from headtail.core.near_duplicates import duplicate_clusters
from headtail.core.rows import HUMAN_LABELS
from headtail.releases.look import record_look
from headtail.releases.seal import seal_labels, sealed_keys, split_labels
from test_near_duplicates import paraphrases

pytestmark = pytest.mark.usefixtures("not_drawn")

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def labels(queries: Iterable[str]) -> pa.Table:
    rows = [{"query_key": query_key(q), "query": q, "answer": "{}", "count": 1, "stratum": "tail"} for q in queries]
    return pa.Table.from_pylist(rows, HUMAN_LABELS)


def look(store: Storage, table: pa.Table) -> None:
    record_look(store, "evaluate", "t", "p", {"s": table.append_column("wanted", table["answer"]).append_column("given", table["answer"])})


def parts(store: Storage, table: pa.Table) -> tuple[list[str], list[str]]:
    """(open queries, sealed queries)."""
    opened, sealed = split_labels(store, table)
    return opened["query"].to_pylist(), sealed["query"].to_pylist()


def repeated(opened: Sequence[str], sealed: Sequence[str]) -> list[str]:
    """Sealed queries that nearly repeat an open one: as curate finds them among training rows, and as evaluate does among labels."""
    known, clusters = LabelledQueries(opened), duplicate_clusters([*opened, *sealed])
    alike = set(clusters[: len(opened)].tolist())
    return [q for q, cluster in zip(sealed, clusters[len(opened) :].tolist(), strict=True) if known.find(q) or cluster in alike]


@st.composite
def questions(draw: st.DrawFn) -> list[str]:
    """Queries of few words, so that many nearly repeat each other: in another order, or with a letter more, less or moved."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    words = ["".join(rng.choices(LETTERS, k=rng.randrange(4, 11))) for _ in range(draw(st.integers(5, 30)))]
    found = [" ".join(rng.sample(words, rng.randrange(1, 4))) for _ in range(draw(st.integers(20, 80)))]
    for text in rng.sample(found, len(found) // 2):
        at = rng.randrange(len(text))
        found.append(rng.choice([text[:at] + rng.choice(LETTERS) + text[at:], " ".join(reversed(text.split(" "))), f"{text}s"]))
    return list(dict.fromkeys(" ".join(text.split()) for text in found))


@settings(max_examples=25, deadline=None)
@given(questions(), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 2**32))
def test_no_sealed_row_nearly_repeats_an_open_one(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], share: float, seed: int
) -> None:
    """Whatever was looked at before; and in whatever order the rows come, the same are drawn."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    seen, drawn = labels(random.Random(seed).sample(rows, len(rows) // 5)), []
    for number, queries in enumerate((rows, shuffled)):
        store = open_storage(str(tmp_path_factory.mktemp("seal") / f"store-{number}"))
        look(store, seen)
        seal_labels(store, "x/y:human_labels", labels(queries), share)
        opened, sealed = parts(store, labels(queries))
        assert repeated(opened, sealed) == []
        assert not set(sealed) & set(seen["query"].to_pylist())
        drawn.append(sealed_keys(store))
    assert drawn[0] == drawn[1]


def test_the_share_stays_near_the_one_asked_for(store: Storage) -> None:
    """1,000 questions, typed in one to four ways."""
    rng = random.Random(5)
    rows = [text for _ in range(1000) for text in paraphrases(rng, 0)[: rng.randrange(1, 5)]]
    for share in (0.3, 0.5):
        sealed, seen = seal_labels(store, "x/y:human_labels", labels(rows), share)
        assert sealed / len(rows) == pytest.approx(share, abs=0.05)
        assert seen == 0


def test_the_chance_of_inclusion_is_the_share_whatever_the_size_of_a_cluster(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Else thinning would be wrong: a row of four alike is sealed as often as one that stands alone."""
    rng, single, four = random.Random(6), list[bool](), list[bool]()
    for number in range(6):
        several = [paraphrases(rng, 0) for _ in range(100)]
        alone = ["".join(rng.choices(LETTERS, k=12)) for _ in range(400)]
        store = open_storage(str(tmp_path_factory.mktemp("seal") / f"store-{number}"))
        seal_labels(store, "x/y:human_labels", labels([*alone, *(text for one in several for text in one)]), 0.4)
        sealed = sealed_keys(store)
        single += [query_key(text) in sealed for text in alone]
        four += [query_key(one[0]) in sealed for one in several]
    assert np.mean(single) == pytest.approx(0.4, abs=0.04)
    assert np.mean(four) == pytest.approx(0.4, abs=0.08)


def test_a_cluster_that_somebody_saw_a_row_of_stays_open_and_is_counted(store: Storage) -> None:
    rng = random.Random(7)
    several = [paraphrases(rng, 0) for _ in range(60)]
    look(store, labels(one[3] for one in several[:30]))
    sealed, seen = seal_labels(store, "x/y:human_labels", labels(text for one in several for text in one), 0.5)
    keys = [{query_key(text) for text in one} for one in several]
    inside = [one for one in keys if one & sealed_keys(store)]
    assert sealed == sum(map(len, inside))  # whole clusters
    assert 8 < len(inside) < 22
    assert 8 < seen / 4 < 22
    assert not sealed_keys(store) & {query_key(text) for one in several[:30] for text in one}


def test_a_table_that_is_sealed_later_follows_those_before(store: Storage) -> None:
    """A new table's rows that nearly repeat a sealed one are sealed, those that nearly repeat one that was looked at stay open."""
    rng = random.Random(8)
    several = [paraphrases(rng, 0) for _ in range(80)]
    first, later = labels(one[0] for one in several), labels(text for one in several for text in one[1:])
    keep(store, "plan", "p" * 16, {"human_labels": first})
    seal_labels(store, "plan/" + "p" * 16 + ":human_labels", first, 0.5)
    opened, _ = split_labels(store, first)
    look(store, opened)
    sealed, seen = seal_labels(store, "x/y:human_labels", later, 0.5)
    both = [text for one in several for text in one]
    assert repeated(*parts(store, labels(both))) == []
    assert sealed == 3 * (80 - opened.num_rows)
    assert seen > 0
    assert len(sealed_keys(store)) <= 4 * (80 - opened.num_rows)  # a slip that is none makes no other text


def test_rows_that_a_version_before_left_beside_sealed_ones_are_counted_and_a_gates_look_is_none(store: Storage) -> None:
    """Sealed query by query: what nobody saw follows into the seal. What the gate alone saw is no reason to leave it open."""
    one, other = "cheap flights rome", "rome cheap flights"
    seal_labels(store, "x/y:human_labels", labels([one]), 0.99)
    look(store, labels([one]))  # by the gate: the row is sealed
    assert seal_labels(store, "x/y:human_labels", labels([one, other]), 0.01) == (2, 0)
    assert sealed_keys(store) == {query_key(one), query_key(other)}
