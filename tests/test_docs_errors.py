"""docs/troubleshooting.md is searched by the text of an error: each text that it quotes is one that headtail prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGE = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ELSEWHERE = {"Command.__init__() got an unexpected keyword argument 'use_ninja'"}  # setuptools prints it
QUOTED = sorted(set(re.findall(r"\*\*`([^`]+)`\*\*", PAGE)) - ELSEWHERE)


@pytest.fixture(scope="module")
def source() -> str:
    """All that can print an error, as one text; a message that is cut over two lines of code is joined."""
    files = [REPO / "Makefile", *sorted((REPO / "platform" / "headtail").rglob("*.py"))]
    return "\n".join(re.sub(r'"\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in files)


def test_errors_are_quoted() -> None:
    assert len(QUOTED) > 25


@pytest.mark.parametrize("text", QUOTED)
def test_a_quoted_error_is_in_the_code(text: str, source: str) -> None:
    assert text in source
