"""The text that a query is kept and looked up by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.query import InvalidQuery, check_query, clean_text
from headtail.core.text import normalise


@given(st.text(max_size=60))
def test_a_query_is_taken_with_its_clean_text_or_refused(query: str) -> None:
    """So a server and a client look up what ingest has kept."""
    if 0 < len(normalise(query)) <= 50:
        assert check_query(query, 50) == clean_text(query) != ""
    else:
        with pytest.raises(InvalidQuery, match=r"^the query "):
            check_query(query, 50)


@pytest.mark.parametrize(
    "query, what",
    [
        ("x" * 41, "41 characters, at most 10"),
        ("x" * 11, "11 characters after normalisation, at most 10"),
        (" \u200b ", "empty"),
        ("pizza \ud800", "half a surrogate pair"),
    ],
)
def test_what_is_not_taken_is_named(query: str, what: str) -> None:
    with pytest.raises(InvalidQuery, match=what) as error:
        check_query(query, 10)
    assert error.value.fix
