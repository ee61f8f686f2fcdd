"""The table of answer sources: its names are those of answers, its colours can be told apart, and a row is all that a source needs."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from headtail.adapters import charts
from headtail.core.answer_source import SOURCES, AnswerSource, source_named
from headtail.core.rows import Source
from headtail.stages.report.tree import REPORTED_STAGES


def test_the_table_is_of_sources_that_rows_can_have() -> None:
    assert {source.name for source in SOURCES} <= {str(source) for source in Source}
    assert [source.role for source in SOURCES].count("teacher") == 1
    for part in ("name", "colour", "dark", "marker", "terminal"):
        assert len({getattr(source, part) for source in SOURCES}) == len(SOURCES), part


def test_figures_have_the_tables_colours() -> None:
    assert {source.name: charts.COLOURS[source.name] for source in SOURCES} == {source.name: source.colour for source in SOURCES}


def test_names_follow_from_the_name() -> None:
    one = source_named(Source.BATCH_STUDENT)
    assert (one.label, one.short, one.stage("distill"), one.model) == ("batch student", "batch", "distill_batch", True)
    assert not source_named(Source.FALLBACK).model
    with pytest.raises(KeyError):
        source_named("nobody")


def test_the_stages_of_a_pipeline_follow_from_the_table() -> None:
    assert (
        *("ingest", "plan", "precompute_teacher", "publish_head", "evaluate_teacher", "curate"),
        *("distill_batch", "precompute_batch", "distill_realtime", "precompute_realtime"),
        *("evaluate", "gate_batch", "gate_realtime", "calibrate", "publish", "replay"),
    ) == REPORTED_STAGES


@pytest.mark.parametrize("wrong", [{"name": "a b"}, {"name": "x<"}, {"colour": "red"}, {"dark": "#FFF"}, {"role": "king"}])
def test_what_a_page_could_not_show_is_refused(wrong: dict[str, str]) -> None:
    """Names are classes and variables of the page's style sheet."""
    with pytest.raises(ValidationError):
        AnswerSource.model_validate({"name": "x", "role": "student", "colour": "#000000", "dark": "#ffffff", **wrong})
