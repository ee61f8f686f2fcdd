"""Write down which files outside this run's own folders a Python process opens, and which programs it starts.

Python imports a module of this name by itself at start, in every process below whoever sets PYTHONPATH to this folder and
HEADTAIL_READS to a folder for the lists: pip, the builds that it starts, Ray's workers. In: audit events (PEP 578). Out: a file
per process, one path a line. Knows nothing of what is allowed: tests/outside/__main__.py judges.
"""

from __future__ import annotations

import os
import sys


def _watch(folder: str, inside: tuple[str, ...]) -> None:
    seen: set[str] = set()

    def note(event: str, args: tuple[object, ...]) -> None:
        if event not in ("open", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or path in seen:
            return
        seen.add(path)
        full = os.path.abspath(path) if event == "open" or os.sep in path else path
        if full.startswith(inside):
            return
        out = os.open(os.path.join(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(out, f"{event}\t{full}\n".encode("utf-8", "surrogateescape"))
        finally:
            os.close(out)

    sys.addaudithook(note)


if os.environ.get("HEADTAIL_READS"):
    _inside = [folder for folder in os.environ.get("HEADTAIL_INSIDE", "").split(":") if folder]
    _watch(os.environ["HEADTAIL_READS"], (*_inside, sys.prefix + os.sep))
