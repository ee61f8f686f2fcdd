"""Keys: the same content gives the same key, different content a different one, and what cannot be hashed is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.errors import KeyingError
from headtail.core.keys import KEY_BYTES, answer_key, canonical, fingerprint, query_key, sha256_file, sha256_tree
from headtail.core.rows import KEY, shards_of

text = st.text(max_size=60)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda x: st.lists(x) | st.dictionaries(text, x),
)


@given(text, text)
def test_query_keys_differ_when_texts_differ(a: str, b: str) -> None:
    assert (query_key(a) == query_key(b)) == (a == b)
    assert len(query_key(a)) == KEY_BYTES


@given(plain)
def test_fingerprint_ignores_order_of_names(value: object) -> None:
    wrapped = {"b": value, "a": 1}
    assert fingerprint(wrapped) == fingerprint(dict(reversed(list(wrapped.items()))))


@given(plain, plain)
def test_canonical_is_injective(a: object, b: object) -> None:
    if canonical(a) == canonical(b):
        assert a == b


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"a": {"b": object()}}, len])
def test_what_cannot_be_hashed_is_refused(value: object) -> None:
    with pytest.raises(KeyingError):
        fingerprint(value)


def test_refusal_names_the_place() -> None:
    with pytest.raises(KeyingError, match="object") as error:
        fingerprint({"model": [1, object()]}, "settings")
    assert error.value.where == "settings.model[1]"


def test_answer_key_covers_every_part_and_every_boundary() -> None:
    base = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    keys = {
        answer_key(base, "s"),
        answer_key(base, "t"),
        answer_key([{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}], "s"),
        answer_key([{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}], "s"),
        answer_key(base[:1], "s"),
        answer_key(base[::-1], "s"),
    }
    assert len(keys) == 6


def test_keys_are_the_same_in_another_process() -> None:
    code = "from headtail.core.keys import *; print(query_key('pizza near me').hex(), fingerprint({'b': [1, 2.5], 'a': None}))"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert seen == {f"{query_key('pizza near me').hex()} {fingerprint({'a': None, 'b': [1, 2.5]})}\n"}


def test_shards_are_even() -> None:
    counts = Counter(shards_of(pa.array([query_key(str(i)) for i in range(16_000)], KEY), 16).tolist())
    assert sorted(counts) == list(range(16))
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_sha256_tree_sees_names_and_bytes(tmp_path: Path) -> None:
    def tree() -> str:
        return sha256_tree({path.name: sha256_file(path) for path in tmp_path.iterdir()})

    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    first = tree()
    (tmp_path / "a").rename(tmp_path / "c")
    assert tree() != first
    (tmp_path / "c").rename(tmp_path / "a")
    assert tree() == first
    (tmp_path / "b").write_text("z")
    assert tree() != first
