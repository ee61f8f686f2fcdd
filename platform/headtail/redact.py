"""Obvious personal data out of a query: e-mail addresses, payment card numbers, telephone numbers.

In: normalised text. Out: the text with `<email>`, `<card>`, `<phone>` in their place, and which of them were found.
Written so that ordinary queries keep their numbers: years, prices, dates, zip codes, sizes, model numbers, barcodes.
Knows nothing of names, addresses or account numbers: it lowers the risk, it does not anonymise a log.
"""

from __future__ import annotations

import re
from typing import NamedTuple

VERSION = 1  # part of ingest's fingerprint; raise it when a rule changes

# What every rule needs: an at sign, a plus before a digit, or nine digits close together. Other text is left alone at no cost;
# also valid as RE2, to look for it in bulk.
CANDIDATE = r"@|\+\d|\d(?:\D{0,3}\d){8}"
_MAYBE = re.compile(CANDIDATE)

_EMAIL = re.compile(r"[^\s@<>()\[\]\",;:]+@[^\s@<>()\[\]\",;:]+\.[^\W\d_]{2,}")

# Lengths and first digits by network (ISO/IEC 7812 ranges as the networks publish them). A 15-digit number is only a card when
# it starts as American Express does: 15-digit device numbers (IMEI) pass the Luhn test too.
_NETWORKS = re.compile(
    r"""4(?:\d{12}|\d{15}|\d{18})                                   # Visa: 13, 16, 19
      | (?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}  # Mastercard: 16
      | 3[47]\d{13}                                                 # American Express: 15
      | (?:30[0-5]|3[689]\d)\d{11}                                  # Diners Club: 14
      | (?:6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}                   # Discover, UnionPay: 16-19
      | 35(?:2[89]|[3-8]\d)\d{12}                                   # JCB: 16
      | 220[0-4]\d{12}                                              # Mir: 16
      | (?:50|5[6-9]|6[37])\d{14}                                   # Maestro: 16
    """,
    re.VERBOSE,
)
_GROUPED = re.compile(r"(?<![\w.,+-])\d{1,19}(?:[ -]\d{2,19})*(?![\w]|[.,]\d)")

_PHONE = re.compile(
    r"""(?<![\w.,/+@-])(?:
        \+[1-9](?:[ .()/-]{0,2}\d){7,14}                             # +49 171 1234567: 8-15 digits (ITU-T E.164)
      | 00[1-9]\d(?:[ .()/-]{0,2}\d){7,13}                          # 0049 (0)171-1234567
      | (?:1[ .-]?)?\([2-9]\d\d\)[ ]?[2-9]\d\d[ .-]?\d{4}            # (555) 234-5678
      | (?:1[.-])?[2-9]\d\d([.-])[2-9]\d\d\1\d{4}                    # 555-234-5678, 1-555-234-5678, 555.234.5678
      | (?:1[ ])?[2-9]\d\d[ ](?!\d\d0[ -]\d\d00)[2-9]\d\d[ -]\d{4}   # 555 234 5678, but not 200 300 4000
      | 1?[2-9][0-8]\d[2-9]\d{6}                                     # 5552345678
      | [6-9]\d{9}                                                   # Indian mobile
      | 0[1-9](?:[ .-]\d\d){4}                                       # 06 12 34 56 78
      | 0[1-9]\d{1,4}[ /-]\d{3,4}[ -]?\d{3,4}                        # 020 7946 0958, 01234 567890
      | 0[1-9]\d{8,9}                                                # 01712345678
    )(?![\w]|[.,/-]\d)""",
    re.VERBOSE,
)


class Redacted(NamedTuple):
    """The text without what was found, and whether each kind was."""

    text: str
    email: bool = False
    phone: bool = False
    card: bool = False

    @property
    def any(self) -> bool:
        """Whether something was taken out."""
        return self.email or self.phone or self.card


def redact(text: str) -> Redacted:
    """`text` (normalised) with personal data replaced; still normalised, and the same when done twice."""
    if not _MAYBE.search(text):
        return Redacted(text)
    clean, emails = _EMAIL.subn("<email>", text)
    clean, cards = _cards(clean)
    clean, phones = _PHONE.subn("<phone>", clean)
    return Redacted(clean, emails > 0, phones > 0, cards > 0)


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _cards(text: str) -> tuple[str, int]:
    found = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal found
        pieces = re.split(r"([ -])", match.group())  # digits and separators in turn
        kept: list[str] = []
        at = 0
        while at < len(pieces):
            end = _card_end(pieces, at)
            if end:
                found += 1
                kept.append("<card>")
            else:
                kept.append(pieces[at])
            at = end or at + 1
        return "".join(kept)

    return _GROUPED.sub(replace, text), found


def _card_end(pieces: list[str], start: int) -> int:
    """The index after a card number that starts at group `start`, the longest one; 0 when there is none."""
    if start % 2:
        return 0
    digits, end = "", 0
    for at in range(start, len(pieces), 2):
        digits += pieces[at]
        if len(digits) > 19:
            break
        if len(digits) >= 13 and _NETWORKS.fullmatch(digits) and luhn(digits):
            end = at + 1
    return end
