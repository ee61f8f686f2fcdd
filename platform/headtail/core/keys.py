"""Names for content: query keys, fingerprints and answer keys; `normalise` of `text` is here too.

In: text, or plain values. Out: 16-byte keys (blake2b-128), hex fingerprints. The same content gives the same key on
every machine and in every process; a value without a canonical form is refused, never skipped.
Knows nothing of tables or files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from headtail.core.errors import KeyingError
from headtail.core.text import NORMALISATION as NORMALISATION
from headtail.core.text import normalise as normalise

KEY_BYTES = 16


def query_key(normalised: str) -> bytes:
    """The 16-byte key of a text that `normalise` has been through."""
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def canonical(value: object, where: str = "value") -> str:
    """One JSON text per value: sorted keys, no blanks. Raises KeyingError for what JSON cannot hold exactly."""
    return json.dumps(_plain(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: object, where: str) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise KeyingError("a number that is not finite cannot be part of a key", where=where, value=value)
        return value
    if isinstance(value, bytes):
        return {"__bytes__": value.hex()}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise KeyingError("keys of a mapping must be text", where=where, value=key)
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise KeyingError(
        f"a {type(value).__name__} cannot be part of a key",
        where=where,
        value=value,
        fix="use text, numbers, lists and mappings only",
    )


def fingerprint(value: object, where: str = "value") -> str:
    """32 hex digits over the canonical form of `value`."""
    return hashlib.blake2b(canonical(value, where).encode(), digest_size=KEY_BYTES).hexdigest()


def answer_key(messages: Sequence[Mapping[str, str]], settings: str) -> bytes:
    """The key of one answer: rendered messages plus `settings`, the fingerprint of all else that changes it.

    `settings` covers model and weights digest, adapter, sampling, schema and engine family (see `generate`).
    """
    first, *others = messages
    digest = _start_digest(settings, first["role"], first["content"]).copy()
    for message in others:
        _add(digest, message["role"], message["content"])
    return bytes(digest.digest())


@lru_cache(64)
def _start_digest(settings: str, role: str, content: str) -> Any:
    """The first message is most often the same for all rows of a job: it is hashed once."""
    digest = hashlib.blake2b(settings.encode(), digest_size=KEY_BYTES)
    _add(digest, role, content)
    return digest


def _add(digest: Any, role: str, content: str) -> None:
    for part in (role, content):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths keep ("ab","c") apart from ("a","bc")


def overlapping_shards(shard: int, shards: int, others: int) -> range:
    """Which of `others` shards hold keys of shard `shard` of `shards`, as `rows.shards_of` spreads them."""
    first, end = -(-(shard << 32) // shards), -(-((shard + 1) << 32) // shards)
    return range(first * others >> 32, ((end - 1) * others >> 32) + 1)


class Readable(Protocol):
    """An open file of bytes: Python's own, or one of Arrow's."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def sha256_stream(file: Readable, chunk: int = 1 << 20) -> str:
    """Hex SHA-256 of what is left to read of `file`, read `chunk` bytes at a time."""
    digest = hashlib.sha256()
    while data := file.read(chunk):
        digest.update(data)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_tree(files: Mapping[str, str]) -> str:
    """Hex SHA-256 over (relative name, hex SHA-256) of every file of a folder, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{files[name]}\n".encode())
    return digest.hexdigest()
