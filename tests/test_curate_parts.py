"""The parts of curation that are pure: tags, decisions, draws, learning curves, neighbours."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.bounds import LAWS, enough_cover
from headtail.core.keys import normalise, query_key
from headtail.core.leaks import LabelledQueries
from headtail.core.rows import REVIEWED
from headtail.core.task import Task
from headtail.examples import example_data
from headtail.stages.curate import columns, curve, decisions, neighbours, signals, suspects
from headtail.stages.curate.curve import Point
from headtail.stages.curate.draw import Pool, allot, pick
from headtail.stages.curate.tags import align_words, label_fields, tag, untag
from headtail.stages.curate.verdicts import scan_places
from test_curate import one, table


@given(st.integers(0, 100_000), st.integers(0, example_data.VARIANTS - 1))
@settings(max_examples=80)
def test_tags_of_a_right_answer_hold_every_word_and_give_it_back(rank: int, variant: int) -> None:
    """Misspelt words are matched with what the answer writes for them, so that nothing is absent and nothing left out."""
    from headtail.core.task import load_task

    task, found = load_task("query_segmentation"), example_data.meaning(7, rank, 40_000)
    query, answer = normalise(example_data.misspell(found.text, variant)), example_data.right_answers(found)["query_segmentation"]
    tagged = tag(task, query, answer)
    if len(query.split()) == len(found.text.split()):
        assert not tagged.absent
        assert all(word.tag != "O" for word in tagged.words)
        back = untag(task, [word.written for word in tagged.words], [word.tag for word in tagged.words])
        assert back == answer


def test_tags_of_a_wrong_answer(segmentation: Task) -> None:
    answer = {"segments": [{"text": "sushi", "label": "topic"}, {"text": "boston", "label": "location"}]}
    tagged = tag(segmentation, "pizza in chicago", answer)
    assert [word.tag for word in tagged.words] == ["O", "O", "O"]
    assert tagged.absent == ("sushi", "boston")
    assert tagged.kind == "location+topic"
    assert align_words(["boston", "pizza"], ["pizza", "boston"]) == [1, 0]


def test_label_fields(segmentation: Task, intent: Task) -> None:
    assert label_fields(intent) == ("intent",)
    assert label_fields(segmentation) == ()


def decision(query: str, verdict: str, answer: str | None, answer_key: bytes | None = None) -> dict[str, object]:
    row = {"query_key": query_key(query), "query": query, "verdict": verdict, "answer": answer, "answer_key": answer_key}
    return {**row, "before": None, "who": "anna", "at": "2026-01-01T00:00:00.000+00:00", "why": ""}


def test_decisions_are_laid_over_rows(segmentation: Task) -> None:
    good = '{"segments":[{"label":"topic","text":"a"}]}'
    said = [
        decision("a", "correct", good),
        decision("b", "accept", '{"segments": "old schema"}'),
        decision("c", "drop", None, query_key("ac")),
        decision("d", "drop", None, query_key("another answer")),
        decision("elsewhere", "correct", good),
    ]
    made = decisions.read_decisions(pa.Table.from_pylist(said, schema=REVIEWED), segmentation)
    rows = columns.read_columns([table([one("a"), one("b"), one("c"), one("d"), one("e")])], LabelledQueries([]), 0)
    laid = decisions.match_decisions(made, rows)
    assert laid.answer.tolist() == [good, None, None, None, None]
    assert laid.dropped.tolist() == [False, False, True, False, False]
    assert len(laid.notes) == 3
    assert [note.split(" ")[0] for note in laid.notes] == ["1", "1", "1"]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.integers(0, 200), st.data())
def test_allot_gives_away_all_there_is_room_for(weights: list[float], room: int, data: st.DataObject) -> None:
    most = np.asarray(data.draw(st.lists(st.integers(0, 30), min_size=len(weights), max_size=len(weights))), dtype=np.int64)
    given_away = allot(np.asarray(weights), most, room)
    assert given_away.sum() == min(room, most.sum())
    assert (given_away <= most).all()
    assert (given_away >= 0).all()


def pool(n: int, rng: np.random.Generator) -> Pool:
    kinds = np.asarray(rng.choice(["common", "usual", "rare"], n, p=[0.9, 0.099, 0.001]), dtype=object)
    made = Pool.by_stratum(np.asarray(rng.choice(["head", "tail"], n), dtype=object), rng.random(n), rng.zipf(1.5, n).astype(float))
    return made._replace(kind=kinds, cluster=rng.integers(0, 8, n))


def test_a_draw_meets_every_label_and_cluster_and_people_first() -> None:
    rng = np.random.default_rng(0)
    rows = pool(20_000, rng)
    rows.first[:30] = True
    chosen, _ = pick(rows, 600, {"tail": 0.3})
    assert len(chosen) == 600
    assert set(range(30)) <= set(chosen.tolist())
    met = Counter(zip(rows.kind[chosen].tolist(), rows.cluster[chosen].tolist(), strict=True))
    assert len(met) >= 20  # of 24 cells; the rare kind has some 20 rows in all
    assert Counter(rows.kind[chosen].tolist())["rare"] >= min(20, Counter(rows.kind.tolist())["rare"])
    assert (rows.stratum[chosen] == "tail").sum() >= 180
    shuffled = rng.permutation(20_000)
    again, _ = pick(rows.take(shuffled), 600, {"tail": 0.3})
    assert set(shuffled[again].tolist()) == set(chosen.tolist()), "order changes nothing"


def test_traffic_and_number_both_count_in_a_draw() -> None:
    rng = np.random.default_rng(1)
    rows = Pool.by_stratum(np.full(2000, "head", dtype=object), rng.random(2000), np.repeat([1.0, 100.0], 1000))
    rows = rows._replace(cluster=np.repeat([0, 1], 1000))
    chosen, _ = pick(rows, 200, {})
    assert 110 < (rows.cluster[chosen] == 1).sum() < 160


def test_the_curve_finds_the_law_it_was_made_from() -> None:
    law = [Point(n, 2.0 * n**-0.5 + 0.03) for n in (125, 250, 500, 1000, 2000, 4000)]
    found = curve.fit(law, 0.001)
    assert found is not None
    assert found.b == pytest.approx(0.5, abs=0.03)
    assert found.c == pytest.approx(0.03, abs=0.003)
    gain = found.gain(found.enough)
    assert gain == pytest.approx(0.001, rel=0.01)
    assert found.enough == pytest.approx((2.0 * (1 - math.sqrt(0.5)) / 0.001) ** 2, rel=0.1)


@pytest.mark.parametrize("tested", [3000, 12_000])
@pytest.mark.parametrize("law, least", [(LAWS[0], 0.7), (LAWS[3], 0.6)])
def test_the_interval_of_enough_holds_the_true_size(tested: int, law: tuple[float, float, float], least: float) -> None:
    """Nominal 0.80; 60 curves of a known law. Too narrow an interval would hold less, one without ends always. Of an error that falls to
    none it held 0.47 of the time before laws with c = 0 counted."""
    cover, ratio = enough_cover(law, tested, 60)
    assert least <= cover < 1
    assert 1 < ratio < 100


def test_enough_lies_within_its_interval_which_narrows_with_labels() -> None:
    law = [Point(n, 2.0 * n**-0.5 + 0.03, doubt) for n, doubt in zip((125, 250, 500, 1000, 2000, 4000), [0.004] * 6, strict=True)]
    found, surer = curve.fit(law, 0.002), curve.fit([point._replace(doubt=0.001) for point in law], 0.002)
    exact = curve.fit([point._replace(doubt=0.0) for point in law], 0.002)
    assert found
    assert surer
    assert exact
    assert found.enough_low < surer.enough_low < found.enough < surer.enough_high < found.enough_high
    assert exact.enough_low == exact.enough == exact.enough_high
    flat = [Point(n, error, 0.02) for n, error in ((125, 0.11), (250, 0.10), (500, 0.105), (1000, 0.10))]
    unknown = curve.fit(flat, 0.0001)
    assert unknown is None or unknown.enough_high == 2**53, "points that may not fall show no upper end"


def test_no_curve_where_there_is_none() -> None:
    assert curve.fit([Point(125, 0.1), Point(250, 0.05)], 0.001) is None
    assert curve.fit([Point(n, 0.1) for n in (125, 250, 500, 1000)], 0.001) is None


def test_neighbours_are_the_nearest_others() -> None:
    texts = ["pizza chicago", "pizza in chicago", "plumber near me", "plumbers near me", "book a table", "sushi"] * 1 + [
        f"other {i} query {i * 7}" for i in range(200)
    ]
    places = neighbours.embed(texts, 0)
    near = neighbours.nearest(places, 3)
    assert near.row[0, 0] == 1
    assert near.row[2, 0] == 3
    assert all(row not in found for row, found in enumerate(near.row.tolist()))
    assert len(set(neighbours.clusters(places, 4, 0).tolist())) == 4
    assert neighbours.embed(["one"], 0).shape[0] == 1
    assert neighbours.nearest(neighbours.embed(["one"], 0), 5).row.shape == (1, 0)


def test_a_rule_that_hits_all_weighs_nothing_and_a_rare_one_much() -> None:
    hits = np.arange(1000) < 990
    assert abs(signals.rule_signal("always", hits, str).evidence).max() < 0.1
    rare = signals.rule_signal("rare", ~hits, str).evidence
    assert rare[995] > 3.5
    assert -1 < rare[0] < 0
    assert not signals.rule_signal("never", np.zeros(10, dtype=bool), str).evidence.any()


def test_scores_add_up_to_the_share_that_is_believed() -> None:
    evidence = np.random.default_rng(0).normal(0, 3, 5000)
    signal = signals.Signal("s", 1.0, evidence, str)
    total = suspects.sum_evidence([signal], 5000)
    scores = suspects.score_curve(total, 0.07)(total)
    assert scores.mean() == pytest.approx(0.07, abs=1e-3)
    assert (np.argsort(scores, kind="stable") == np.argsort(evidence, kind="stable")).all()
    none = suspects.sum_evidence([], 10)
    assert suspects.score_curve(none, 0.07)(none) == pytest.approx(np.full(10, 0.07))


def test_what_is_looked_at_is_bounded_half_by_traffic() -> None:
    rows = columns.read_columns([table([one(f"q{i}", count=i) for i in range(100)])], LabelledQueries([]), 0)
    mine = np.zeros(100, dtype=bool)
    mine[3] = True
    among = np.ones(100, dtype=bool)
    seen = scan_places(rows, mine, among, 20)
    assert len(seen) == 20
    assert {3, *range(91, 100)} <= set(seen.tolist())
    assert len(scan_places(rows, mine, among, 100)) == 100
