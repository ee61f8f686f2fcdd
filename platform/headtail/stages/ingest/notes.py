"""What a reader of an ingest receipt should know: files and rows that were not used, redaction, what the normal form brings.

In: counts by reason, kind and rule. Out: sentences. Pure. Knows nothing of stores or of the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headtail.core import cells
from headtail.stages.ingest.files import SkippedFile
from headtail.stages.ingest.result import RuleCoverage

_SHOWN = 5  # files set aside that are named on the terminal
CURES = {
    "bad_time": f"columns.time takes {cells.TIMES}",
    "bad_count": "columns.count takes whole numbers from 1",
    "ambiguous": "their quotes or backslashes can be read in two ways: set `quotes` to doubled, backslash, escaped or none",
    "header": "they repeat the header, as where files were joined",
    "before_gap": "their dates are long before the log's other days, and they are few",
    "after_gap": "their dates are after a gap, and they are few",
    "after_today": "their dates are after today",
    "bad_row": "they have not the header's number of cells, or are no JSON object, or their query is true, false, a list or an object, "
    "or are lines that psql or sqlcmd draws: "
    "correct the program that writes them, or set `quotes`",
    "nul": "they hold a zero byte",
    "name_twice": "their JSON has a column twice",
}
_MANY_REDACTED = 0.01  # share of events above which numbers of things may have been read as numbers of people
_REDACTED_LIKE = {
    "email": "e-mail addresses (as name@host.org)",
    "phone": "telephone numbers (as +1 555 234 5678, 555-234-5678, call 5552345678)",
    "card": "card numbers (16 digits, or 4-4-4-4)",
}


def aside_notes(reasons: Counter[str], skipped: Sequence[SkippedFile]) -> list[str]:
    """The files that were not read, and the rows whose reason has a cure."""
    notes = [f"not read: {file.name}: {file.reason}" for file in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        notes.append(f"not read: {len(skipped) - _SHOWN:,} more files; the receipt lists them under result.files_set_aside")
    return notes + [f"rows set aside: {reasons[reason]:,}; {text}" for reason, text in CURES.items() if reasons[reason]]


def redaction_notes(redacted: Counter[str], events: int) -> list[str]:
    """Where so many events were redacted that part numbers may be among them."""
    share = redacted["any"] / max(1, events)
    if share <= _MANY_REDACTED:
        return []
    kinds = ", ".join(f"{redacted[kind]:,} {like}" for kind, like in _REDACTED_LIKE.items() if redacted[kind])
    return [f"{share:.1%} of log events had their query redacted: {kinds}. If these are part numbers, see docs/text.md"]


def rule_notes(rules: Sequence[RuleCoverage]) -> list[str]:
    """What each rule of the normal form merges."""
    brought = ", ".join(f"{rule.rule} {rule.merged_events:.1%}" for rule in rules if rule.merged_events)
    return [f"share of events that a rule of the normal form adds to queries which also came without it: {brought}"] if brought else []
