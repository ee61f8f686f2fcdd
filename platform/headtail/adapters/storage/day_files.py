"""The files that a running server writes by day, such as `requests/2031-01-31/120000-node-7-1.parquet`.

In: a folder of the store. Out: the path of a new one, the paths of those that are there. Results of stages may lie beside them. Knows
nothing of what is in them.
"""

from __future__ import annotations

import datetime
import os
import re

from headtail.adapters.storage.base import Storage

REQUESTS, FEEDBACK_FOLDER = "requests", "feedback"  # folders of the request log and of what users did
_DAY = re.compile(r"\w+/(\d{4}-\d{2}-\d{2})/[^/]+\.parquet")


def day_file(folder: str, number: int) -> str:
    """The path of a file that this process writes now. `number`: of the file in this process."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{folder}/{now:%Y-%m-%d}/{now:%H%M%S}-{os.uname().nodename[:40]}-{os.getpid()}-{number}.parquet"


def list_day_files(store: Storage, folder: str) -> dict[str, int]:
    """Bytes by path of the files that a server wrote below `folder`."""
    return {file.path: file.bytes for file in store.files(folder) if _DAY.fullmatch(file.path)}


def day_of(path: str) -> str:
    """The day of such a file, as 2031-01-31."""
    found = _DAY.fullmatch(path)
    assert found
    return found[1]
