"""Errors a person can act on.

Every error headtail raises on purpose says what went wrong, where, which value was seen and what to do.
The command line prints `str(error)` and exits with `error.exit_code`; a stack trace means a bug in headtail.
No error holds a key or a login of the environment. Knows nothing of files, engines or frameworks.
"""

from __future__ import annotations

from headtail.core.secrets import hide, hide_in


class HeadtailError(Exception):
    """Base of all deliberate errors. `exit_code`: 1 a job failed, 2 the input or configuration is wrong."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", value: object = None, fix: str = "") -> None:
        self.what, self.where, self.fix = hide(what), hide(where), hide(fix)
        self.value = hide_in(value)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.value is not None:
            text = hide(str(self.value))
            lines.append(f"  value: {text if len(text) <= 200 else text[:200] + '... (' + str(len(text)) + ' characters)'}")
        if self.fix:
            lines.append(f"  do:    {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # so that an error raised in a Ray worker arrives whole
        return _rebuild, (type(self), self.what, self.where, self.value, self.fix)


def _rebuild(kind: type[HeadtailError], what: str, where: str, value: object, fix: str) -> HeadtailError:
    return kind(what, where=where, value=value, fix=fix)


class ConfigError(HeadtailError):
    """A field of a config, a task or a flag is unknown, missing or out of range."""

    exit_code = 2


class InputError(HeadtailError):
    """A file that the user named is missing, unreadable, empty or lacks a column."""

    exit_code = 2


class StorageError(HeadtailError):
    """The store could not be read or written: permission, space, network."""


class KeyingError(HeadtailError):
    """A value that would change a result cannot be hashed, so no key can be made."""

    exit_code = 2


class LedgerError(HeadtailError):
    """Rows that went in and rows that came out do not add up."""


class EngineError(HeadtailError):
    """An inference engine could not start or broke down as a whole (a single bad row is a state, not an error)."""


class LimitReached(HeadtailError):
    """A job stopped before its end because a limit that the user set was reached. What is finished is kept."""


class LeakError(HeadtailError):
    """A row of an evaluation set was about to be trained on."""


class TrainingError(HeadtailError):
    """A training run ended without a model that may be used."""


class GateRejected(HeadtailError):
    """A student or a snapshot was not good enough to be promoted."""
