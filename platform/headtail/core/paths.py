"""Paths and ids that are read from a store, a receipt, a manifest or a release: what they may be. Pure.

In: text that somebody else may have written. Out: the same text, or a ValueError that says what is wrong with it. The types
StorePath, StoreId and StudentRef put the check where a record is parsed; `storage` checks every path again, so that
text from elsewhere cannot bypass the check. Knows nothing of what lies at a path.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator

MOST_BYTES, MOST_PART_BYTES = 1024, 255  # of a key in S3; of a name in a file system
_PLAIN = re.compile(r"(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*", re.ASCII)  # what nearly every path is: no look at single characters is needed
_DRIVE = re.compile(r"[A-Za-z]:")


def store_path(value: str) -> str:
    """`value` when it is a path below a store's root: relative, in its shortest form, of visible characters. Else ValueError."""
    if _PLAIN.fullmatch(value) and len(value) <= MOST_PART_BYTES:
        return value
    parts = value.split("/")
    if not value or value.startswith(("/", "~")) or _DRIVE.match(value):
        raise ValueError("a path in a store is relative to the store's root")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("a path in a store has no empty part, no `.` and no `..`")
    if "\\" in value or any(unicodedata.category(character) in ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp") for character in value):
        raise ValueError("a path in a store has no backslash and no invisible character")
    if len(value.encode()) > MOST_BYTES or any(len(part.encode()) > MOST_PART_BYTES for part in parts):
        raise ValueError(f"a path in a store has at most {MOST_BYTES} bytes, a part of it at most {MOST_PART_BYTES}")
    return value


def store_id(value: str) -> str:
    """`value` when it is one part of a store's path: letters, digits, `_`, `-`, `.`; no dot at the start. Else ValueError."""
    if len(value) > 128 or "/" in value or not _PLAIN.fullmatch(value):
        raise ValueError("an id is one part of a path: at most 128 letters, digits, `_`, `-` and `.`, and no dot at the start")
    return value


def below(*folders: str) -> Callable[[str], str]:
    """A check that a path lies below one of `folders`."""

    def check(value: str) -> str:
        if not any(store_path(value).startswith(f"{folder}/") for folder in folders):
            raise ValueError(f"this path must lie below {' or '.join(f'{folder}/' for folder in folders)}")
        return value

    return check


def _or_empty(check: Callable[[str], str]) -> Callable[[str], str]:
    return lambda value: check(value) if value else value


StorePath = Annotated[str, AfterValidator(store_path)]
StoreId = Annotated[str, AfterValidator(store_id)]
StorePathOrEmpty = Annotated[str, AfterValidator(_or_empty(store_path))]
StoreIdOrEmpty = Annotated[str, AfterValidator(_or_empty(store_id))]
AnswersPath = Annotated[str, AfterValidator(below("precompute"))]
StudentOrEmpty = Annotated[str, AfterValidator(_or_empty(below("distill")))]
