"""Row schemas: tables are brought to them without loss, or refused by name."""

from __future__ import annotations

import pyarrow as pa
import pytest

from headtail.core.errors import InputError
from headtail.core.rows import HUMAN_LABELS, QUERY, SIDE_INPUT, State, conform, with_side_inputs


def test_side_inputs_come_last() -> None:
    schema = with_side_inputs(HUMAN_LABELS, ["businesses", "categories"])
    assert schema.names[-2:] == ["businesses", "categories"]
    assert schema.field("categories").type == SIDE_INPUT


def test_conform_orders_and_casts() -> None:
    table = pa.table(
        {
            "count": pa.array([1], pa.int32()),
            "extra": ["x"],
            "query": ["q"],
            "query_key": [b"0" * 16],
            "first_day": [None],
            "last_day": [None],
        }
    )
    assert conform(table, QUERY, "t").schema == QUERY


def test_conform_names_what_is_missing() -> None:
    with pytest.raises(InputError, match="lacks columns query_key, count"):
        conform(pa.table({"query": ["q"], "first_day": [None], "last_day": [None]}), QUERY, "t")


def test_conform_refuses_loss() -> None:
    table = pa.table({"query_key": [b"0" * 16], "query": ["q"], "count": [1.5], "first_day": [None], "last_day": [None]})
    with pytest.raises(InputError, match="does not fit"):
        conform(table, QUERY, "t")


def test_states_are_the_five() -> None:
    assert {s.value for s in State} == {"answered", "truncated", "invalid", "refused", "failed"}
