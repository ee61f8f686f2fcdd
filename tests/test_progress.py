"""Bars: totals add up, plain lines where there is no terminal, nothing when quiet."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from headtail.adapters import progress
from headtail.cli import main


def test_plain_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_FIRST_PLAIN_S", 0.0)
    with progress.progress_bar("teach", 10, "rows") as shown:
        shown.advance(4)
        shown.advance(6)
    assert shown.done == 10
    assert "teach: 10/10 rows" in capsys.readouterr().err


@pytest.mark.parametrize("hours, lines", [(0.02, 2), (0.1, 4), (2, 6), (24, 9), (21 * 24, 12)])
def test_no_more_than_a_dozen_lines_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hours: float, lines: int
) -> None:
    """At 10 s, 30 s, 90 s, 270 s, ... after the bar began, however often workers report."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress.progress_bar("teach", 10_000_000) as shown:
        for report in range(50_000):
            clock[0] = hours * 3600 * report / 50_000
            shown.update(report)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_FIRST_PLAIN_S", 0.0)
    progress.quiet()
    try:
        progress.say("nothing")
        with progress.progress_bar("x", 1) as shown:
            shown.advance()
    finally:
        progress.quiet(False)
    assert capsys.readouterr().err == ""


def _paced(points: list[tuple[float, int]]) -> progress.ProgressRate:
    pace = progress.ProgressRate()
    for now, done in points:
        pace.see(now, done)
    return pace


def test_the_time_left_counts_neither_start_up_nor_what_an_earlier_run_did() -> None:
    pace = _paced([(0.0, 1000), (15.0, 1000), (30.0, 1000), (31.0, 1100), (34.0, 1400)])
    assert pace.rate == pytest.approx(100.0)  # 400 rows in the 4 s since the last look at which nothing had moved
    assert pace.seconds_left(2400) == pytest.approx(10.0)


def test_no_time_left_before_anything_was_seen() -> None:
    assert progress.ProgressRate().seconds_left(10) is None
    assert _paced([(0.0, 0), (9.0, 0)]).seconds_left(10) is None
    assert _paced([(0.0, 0), (0.5, 1)]).seconds_left(10_000) is None
    assert _paced([(0.0, 0), (30.0, 10)]).seconds_left(10) == 0.0


def test_the_pace_is_that_of_the_last_minute() -> None:
    slow = [(float(t), t) for t in range(300)]
    fast = [(300.0 + t, 300 + 10 * t) for t in range(90)]
    assert _paced(slow + fast).rate == pytest.approx(10.0)


@pytest.mark.parametrize("rate, said", [(0.0, ""), (380.4, "380 rows/s"), (0.42, "0.42 rows/s"), (1 / 55, "55 s a row")])
def test_rates_as_people_say_them(rate: float, said: str) -> None:
    assert progress.format_rate(rate, "rows") == said


@pytest.mark.parametrize("seconds, said", [(8.2, "8 s"), (240.0, "4 min"), (9000.0, "2.5 h"), (267840.0, "3.1 days")])
def test_times_as_people_say_them(seconds: float, said: str) -> None:
    assert progress.format_time_left(seconds) == said


def test_what_looks_like_markup_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("queries such as '[/b] pizza [red]'")
    assert "'[/b] pizza [red]'" in capsys.readouterr().err


HARM = "[/b]pizza[link=x]\x1b]0;title\x07\x1b[2J \x9b31m \u202epgj \x7f :smile:"


def test_no_text_of_users_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither as a line nor in a table, as its title or its heading; and none of it is taken for markup."""
    progress.say(HARM)
    table = Table("query", HARM, title=HARM, caption=HARM)
    table.add_row(HARM, Text(HARM))
    progress.console.print(table, width=400)
    shown = capsys.readouterr().err
    assert shown.count("[/b]pizza[link=x]") == 6
    assert shown.count(":smile:") == 6
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e", "\x7f"}
    assert progress.printable("a\tb\nçé 日本 👨‍👩‍👧") == "a\tb\nçé 日本 👨‍👩‍👧"


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = progress.printable(text)
    assert len(shown) == len(text)
    assert not [sign for sign in shown if unicodedata.category(sign) == "Cc" and sign not in "\t\n"]


def test_an_error_says_a_query_without_acting_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fields", "\x1b[31m[/b]"])
    shown = capsys.readouterr().err
    assert "[31m[/b]" in shown
    assert "\x1b" not in shown
