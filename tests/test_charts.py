"""Charts: one colour per answer source everywhere, the same bytes each time, and pages that can hold them inline."""

from __future__ import annotations

from headtail.adapters import charts


def test_each_source_has_its_colour_wherever_it_stands() -> None:
    sources = ("teacher", "batch_student", "fallback")
    colours = [charts.colour(source, sources) for source in sources]
    assert len(set(colours)) == 3
    assert charts.colour("batch_student", ("batch_student",)) == colours[1]


def test_same_figure_same_bytes() -> None:
    figures = [charts.svg(charts.latency_chart({"cache": [1.0, 2.0, 3.0], "live": [20.0, 30.0]})) for _ in range(2)]
    assert figures[0] == figures[1]
    assert "<svg" in figures[0]


def test_inline_is_one_labelled_element_without_network() -> None:
    made = charts.inline(charts.svg(charts.latency_chart({"cache": [1.0, 2.0]})), "latency", "how long callers waited")
    assert made.lstrip().startswith("<svg")
    assert "how long callers waited" in made
    assert 'xlink:href="http' not in made


def test_nothing_measured_is_still_a_figure() -> None:
    assert "<svg" in charts.svg(charts.latency_chart({}))
