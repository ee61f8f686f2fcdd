"""Judge the lists that tests/outside/sitecustomize.py left: python -m tests.outside READS [ALLOWED ...].

In: the folder of lists; further folders that may be read. Out: on stdout how many files each allowed place gave, which
programs were started, and every path from elsewhere; exit status 1 when there is one, when nothing was recorded at all, or, with
--no-compilers, when a program was started that compiles.
Allowed are the operating system, the interpreter's own installation and the folders that pip is configured to install from.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

COMPILERS = re.compile(
    r"(?:[\w.]+-)*(?:cc|c\+\+|gcc|g\+\+|clang|clang\+\+|cc1|cc1plus|nvcc|hipcc|icpx?|cl|ninja|cmake|rustc|cargo)(?:-[\d.]+)?(?:\.exe)?"
)
SYSTEM = ("/usr/", "/lib/", "/lib64/", "/bin/", "/sbin/", "/etc/", "/proc/", "/sys/", "/dev/", "/run/", "/var/lib/dpkg/")


class Verdict(NamedTuple):
    """Files opened per allowed place, programs started, and what was opened from anywhere else."""

    places: Counter[str]
    programs: Counter[str]
    elsewhere: list[str]

    @property
    def compilers(self) -> list[str]:
        """Programs that compile, also under a name with a platform before it or a version after it."""
        return sorted(name for name in self.programs if COMPILERS.fullmatch(name))


def judge(lines: Iterable[str], allowed: Sequence[str]) -> Verdict:
    """Sort recorded lines (`event<TAB>path`) by the allowed folder that a path lies in. A folder itself counts as inside it."""
    verdict = Verdict(Counter(), Counter(), [])
    elsewhere: set[str] = set()
    for line in lines:
        event, _, path = line.rstrip("\n").partition("\t")
        if event != "open":
            verdict.programs[os.path.basename(path)] += 1
            continue
        place = next((folder for folder in allowed if f"{path}/".startswith(folder)), None)
        if place is None:
            elsewhere.add(path)
        else:
            verdict.places[place] += 1
    verdict.elsewhere.extend(sorted(elsewhere))
    return verdict


def pip_folders() -> list[str]:
    """Local folders that pip is configured to install from, in its settings or its environment variables."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    told += os.environ.get("PIP_FIND_LINKS", "") + " " + os.environ.get("PIP_INDEX_URL", "")
    return re.findall(r"(?:file://)?(/(?!/)[^\s'\"]+)", re.sub(r"https?://\S+", "", told))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdict; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reads", type=Path, help="folder of the lists")
    parser.add_argument("allowed", nargs="*", help="further folders that may be read")
    parser.add_argument("--no-compilers", action="store_true", help="fail when a compiler was started")
    flags = parser.parse_args(argv)
    lists = sorted(flags.reads.iterdir())
    lines = [line for path in lists for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    own = [sys.base_prefix, *pip_folders(), *flags.allowed]
    verdict = judge(lines, [*SYSTEM, *(folder.rstrip("/") + "/" for folder in own)])
    print(f"opened outside this run's own folders, by {len(lists)} Python processes:")
    for place, count in sorted(verdict.places.items()):
        print(f"  {place:40} {count:7,} files")
    print("programs started: " + ", ".join(f"{name} ({count})" for name, count in sorted(verdict.programs.items())))
    for path in verdict.elsewhere:
        print(f"error: read from outside: {path.encode('utf-8', 'backslashreplace').decode()}")
    if not lines:
        print("error: nothing was recorded: is tests/outside on PYTHONPATH?")
    compilers = verdict.compilers if flags.no_compilers else []
    for name in compilers:
        print(f"error: a compiler was started: {name}")
    return 1 if verdict.elsewhere or compilers or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
