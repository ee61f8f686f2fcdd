"""Errors say what, where, which value, what to do, and survive the way from a worker to the driver."""

from __future__ import annotations

import pickle

from headtail.core.errors import ConfigError, HeadtailError, LeakError


def test_four_lines() -> None:
    error = ConfigError("wrong", where="task.yaml", value=3, fix="use 4")
    assert str(error) == "wrong\n  where: task.yaml\n  value: 3\n  do:    use 4"


def test_long_values_are_cut() -> None:
    assert len(str(HeadtailError("x", value="y" * 10_000))) < 300


def test_pickle_keeps_everything() -> None:
    again = pickle.loads(pickle.dumps(LeakError("leak", where="here", value=[1], fix="stop")))
    assert (type(again), again.what, again.where, again.value, again.fix) == (LeakError, "leak", "here", [1], "stop")
