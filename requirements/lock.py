"""Make a lock from what pip resolved: one `name==version --hash=sha256:...` per package, in order of name.

In: the JSON report of `pip install --dry-run --ignore-installed --report`. Out: a file for
`pip install --no-deps --require-hashes -r`. Written are names, versions and digests, never where a file came from.
A package without a SHA-256 is refused. Knows nothing of resolving: pip does that.

    pip install --dry-run --ignore-installed --quiet --report build/report.json '.[cpu,dev]'
    python requirements/lock.py build/report.json requirements/cpu.lock --without torch torchvision torchaudio torchcodec
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def canonical(name: str) -> str:
    """The form in which package names compare equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(report: dict[str, Any], without: Iterable[str] = ()) -> str:
    """The lock's text. Local folders (this project itself) and the names in `without` are left out."""
    left_out = {canonical(name) for name in without}
    pinned: dict[str, str] = {}
    for item in report["install"]:
        name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
        if name in left_out or "dir_info" in item["download_info"]:
            continue
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            raise SystemExit(f"{name}=={version} has no SHA-256 in the report: cannot be locked")
        pinned[name] = f"{name}=={version} --hash=sha256:{digest}"
    about = report["environment"]
    head = [
        f"# {len(pinned)} packages for {about['platform_python_implementation']} {about['python_version']} on {about['sys_platform']} "
        f"{about['platform_machine']}, every one with the digest of the file that was chosen.",
        "# Made by requirements/lock.py, which says how; do not edit. Install: pip install --no-deps --require-hashes -r <this file>",
        *([f"# Left out on purpose: {', '.join(sorted(left_out))} (docs/decisions/0004-cpu-lock.md)"] if left_out else []),
    ]
    return "\n".join([*head, *(pinned[name] for name in sorted(pinned))]) + "\n"


def main() -> None:
    """Command line: REPORT OUT [--without NAME ...]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON from pip install --report")
    parser.add_argument("out", type=Path, help="lock to write")
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    flags = parser.parse_args()
    text = lock(json.loads(flags.report.read_text(encoding="utf-8")), flags.without)
    flags.out.write_text(text, encoding="utf-8")
    print(f"{flags.out}: {text.count('--hash=')} packages")


if __name__ == "__main__":
    main()
