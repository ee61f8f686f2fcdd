"""One finding of `headtail doctor`: what was checked, what was found, and the cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headtail.core.errors import HeadtailError
from headtail.core.secrets import hide


@dataclass(frozen=True)
class Finding:
    """`status`: ok; warn (the pipeline runs, but look at it); bad (the pipeline would stop). It holds no secret."""

    check: str
    status: Literal["ok", "warn", "bad"]
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, hide(value))


def check_result(check: str, good: bool, found: str, fix: str, otherwise: Literal["warn", "bad"] = "warn") -> Finding:
    """ok when `good`, else `otherwise` with its cure."""
    return Finding(check, "ok", found) if good else Finding(check, otherwise, found, fix)


def error_finding(check: str, error: HeadtailError) -> Finding:
    """A deliberate error as a finding: it already says where, what and the cure."""
    value = "" if error.value is None else f": {error.value}"
    return Finding(check, "bad", f"{f'{error.where}: ' if error.where else ''}{error.what}{value}", error.fix)
