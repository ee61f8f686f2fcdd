"""Bars: totals add up, plain lines where there is no terminal, nothing when quiet."""

from __future__ import annotations

import pytest

from headtail import progress


def test_plain_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.0)
    with progress.bar("teach", 10, "rows") as shown:
        shown.advance(4)
        shown.advance(6)
    assert shown.done == 10
    assert "teach: 10/10 rows" in capsys.readouterr().err


def test_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.0)
    progress.quiet()
    try:
        progress.say("nothing")
        with progress.bar("x", 1) as shown:
            shown.advance()
    finally:
        progress.quiet(False)
    assert capsys.readouterr().err == ""
