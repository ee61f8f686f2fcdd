"""Errors of Python code that a task names: a package's model, a score's function, a guardrail's check.

In: where it is named. Out: a context manager. Knows nothing of what the code does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from headtail.core.errors import ConfigError


@contextlib.contextmanager
def own_code(name: str, where: str, fix: str, field: str = "") -> Iterator[None]:
    """ConfigError for whatever a task's own code raises while it is loaded: its SystemExit must not end the command as if it were done."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):  # the latter is the user's, who wants to stop
        raise
    except BaseException as error:
        what = f"{f'field {field}: ' if field else ''}{type(error).__name__}: {error}"
        raise ConfigError(what, where=where, value=name, fix=fix) from error
