"""What a user named as log or gold: the files found, their columns checked, their bytes put under a digest.

In: a file, folder or glob and the columns it must have, by the config field that names them. Out: Files, or an InputError that
says which columns there are and which was meant. Knows nothing of rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from headtail.errors import InputError
from headtail.keys import fingerprint
from headtail.querylog import logfile
from headtail.querylog.logfile import LogFile


class Files:
    """The files at one place: found, their columns checked, and a digest over names and bytes."""

    def __init__(self, pattern: str, what: str, columns: Mapping[str, str]) -> None:
        self.system, found = logfile.find(pattern, what)
        self.files = [logfile.probe(self.system, file, next(iter(columns.values()))) for file in found]
        for file in self.files:
            for role, name in columns.items():
                _check_column(file, what, role, name)
        self.sha256 = [logfile.sha256(self.system, file) for file in self.files]
        self.digest = fingerprint([[file.name, sha] for file, sha in zip(self.files, self.sha256, strict=True)])
        self.title = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files"

    def facts(self) -> list[dict[str, Any]]:
        """For the receipt: from here one walks to the bytes."""
        return [
            {"path": file.path, "kind": file.kind, "bytes": file.bytes, "sha256": sha}
            for file, sha in zip(self.files, self.sha256, strict=True)
        ]


def _check_column(file: LogFile, what: str, role: str, name: str) -> None:
    sparse = file.kind == logfile.LINES and role == "columns.gold"  # the first lines need not have one
    if name in file.columns or sparse:
        return
    lower = {column.lower(): column for column in file.columns}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    change = f"set {role} to a column that is there" if role.startswith("columns.") else "rename the column in the file"
    raise InputError(
        f"the {what} has no column {name!r}",
        where=file.path,
        value=f"it has {', '.join(file.columns[:30]) or 'no columns'}",
        fix=f"did you mean {lower[near[0]]!r}? {change}" if near else f"{change}; a text file's first line must name its columns",
    )
