"""The files of a log or of labels: found, their columns checked, their bytes hashed.

In: a file, folder or glob and the columns it must have, by the config field that names them. Out: Files, with what is set aside and
why; or an InputError that lists the columns and suggests one. Knows nothing of rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property

from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import fingerprint
from headtail.stages.ingest import files, logfile
from headtail.stages.ingest.files import LogFile, SkippedFile
from headtail.stages.ingest.result import SourceFile
from headtail.stages.ingest.streams import UnusableFile


class Files:
    """The files at one place: found, their columns checked, and a digest over names and bytes."""

    def __init__(self, pattern: str, what: str, columns: Mapping[str, str], also: Sequence[str] = (), quotes: str = "auto") -> None:
        """`columns`: those that must be there, the query's first; `also`: those that may."""
        self.system, found, self.skipped = files.list_files(pattern, what)
        query, *_ = columns.values()
        self.files: list[LogFile] = []
        for file in found:
            try:
                self.files.append(self._check_file(file, what, columns, also, query, quotes))
            except InputError as error:
                if len(found) == 1 or not (file.unsure or isinstance(error, UnusableFile)):
                    raise
                self.skipped.append(SkippedFile(file.name, error.what))
        if not self.files:
            raise files.no_file_error(pattern, what, self.skipped)
        self._named = {*columns.values(), *also}
        self.title = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files"

    @cached_property
    def sha256(self) -> list[str]:
        """Hex digest of each file's bytes. Reads them all."""
        return [logfile.log_digest(self.system, file) for file in self.files]

    @cached_property
    def digest(self) -> str:
        """Over names, bytes, partitions and what is set aside."""
        marks = [[file.name, sha] for file, sha in zip(self.files, self.sha256, strict=True)]
        above = [[value for name, value in file.partitions.items() if name in self._named] for file in self.files]
        return fingerprint([*marks, *(above if any(above) else ()), *map(list, self.skipped)])

    def _check_file(self, file: LogFile, what: str, columns: Mapping[str, str], also: Sequence[str], query: str, quotes: str) -> LogFile:
        probed = logfile.probe_file(self.system, file, query, quotes)
        for role, name in columns.items():
            _check_column(probed, what, role, name)
        for name in (*columns.values(), *also):
            if probed.columns.count(name) > 1:
                raise InputError("two columns have the same name", where=file.path, value=name, fix="rename one of them in the file")
        return probed

    def read(self) -> tuple[SourceFile, ...]:
        """For the receipt: the files and their digests."""
        read = zip(self.files, self.sha256, strict=True)
        return tuple(SourceFile(file=file.path, kind=file.kind, bytes=file.bytes, sha256=sha) for file, sha in read)


def check_column_roles(roles: Sequence[tuple[str, str]]) -> None:
    """ConfigError for a column that has two roles."""
    for at, (role, name) in enumerate(roles):
        for earlier, other in roles[:at]:
            if name == other:
                raise ConfigError("one column has two roles", where=f"{earlier} and {role}", value=name, fix="name another column for one")


def _check_column(file: LogFile, what: str, role: str, name: str) -> None:
    sparse = file.kind == files.LINES and role == "columns.labels"  # the first lines need not have one
    if name in file.columns or name in file.partitions or sparse:
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
