"""Remove obvious personal data from a query: e-mail addresses, payment card numbers, telephone numbers.

In: normalised text. Out: the text with `<email>`, `<card>`, `<phone>` in their place, and which of them were found.
Written so that ordinary queries keep their numbers: years, prices, dates, zip codes, sizes, part numbers, barcodes. A bare
number is a telephone number only beside a word that says so. Time grows linearly with the text: every repeat is bounded or
begins at the start of a word. Knows nothing of names, addresses or account numbers: it lowers the risk, it does not anonymise.
"""

from __future__ import annotations

import re
from typing import NamedTuple

VERSION = 3  # part of ingest's fingerprint; raise it when a rule changes, and text.NORMALISATION with it: servers redact too

# What every rule needs: an at sign, a plus before a digit, seven digits in a row, or nine close together. Other text is left alone
# at no cost; also valid as RE2, to look for it in bulk in ASCII text.
CANDIDATE = r"@|\+\d|\d{7}|\d{3}[.-]\d{4}|\d(?:\D{0,3}\d){8}"
_MAYBE = re.compile(CANDIDATE)
_FIRST = re.compile(r"[@\d]")  # most queries have neither: a fifth of the time of the other pattern
PLACEHOLDER = r"<(?:email|card|phone)>"  # as RE2 and as re; a text that holds one may stand for many questions
_PLACEHOLDER = re.compile(PLACEHOLDER)

_END = r"(?![\w\u0338]|[.,/-]\d)"  # U+0338 would make one character of itself and the placeholder's last

_EMAIL = re.compile(r'(?<![^\s@<>()\[\]",;:])[^\s@<>()\[\]",;:]+@[^\s@<>()\[\]",;:]+\.[^\W\d_]{2,}(?!\u0338)')

# Lengths and first digits by network (ISO/IEC 7812 ranges as the networks publish them). Visa of 13 digits is out of use, and a bare
# 14-digit number is a barcode (GTIN-14) more often than a Diners Club card. A 15-digit number is only a card when it starts as
# American Express does: 15-digit device numbers (IMEI) pass the Luhn test too.
_NETWORKS = re.compile(
    r"""4(?:\d{15}|\d{18})                                          # Visa: 16, 19
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
# As cards print them: 4-4-4-4, with 3 more where there are 19; 4-6-5 (American Express), 4-6-4 (Diners Club); or without blanks.
_CARD = re.compile(
    rf"(?<![\w.,+-])(?:(?P<four>\d{{4}}([ -])\d{{4}}\2\d{{4}}\2\d{{4}})(?:\2\d{{3}})?|\d{{4}}([ -])\d{{6}}\3\d{{4,5}}|\d{{15,19}}){_END}"
)

_PHONE = re.compile(
    rf"""(?<![\w.,/+@-])(?:
        \+(?!\d{{1,3}}\.\d{{4,6}}(?!\d))[1-9](?:[ .()/-]{{0,2}}\d){{7,14}}  # +49 171 1234567: 8-15 digits (E.164); not +40.712776
      | 8[ -]?(?:\([3-9]\d\d\)[ -]?|9\d\d[ -])\d{{3}}[ -]\d\d[ -]?\d\d  # 8 (912) 345-67-89, as Russians write it
      | 00[ ]?[1-9]\d{{1,2}}[ .()/-]{{1,2}}\d(?:[ .()/-]{{0,2}}\d){{6,12}}  # 0049 (0)171-1234567
      | (?:1[ .-]?)?\([2-9]\d\d\)[ ]?[2-9]\d\d[ .-]?\d{{4}}          # (555) 234-5678
      | (?:1[.-])?[2-9]\d\d([.-])[2-9]\d\d\1\d{{4}}                  # 555-234-5678, 1-555-234-5678, 555.234.5678
      | (?:1[ ])?[2-9]\d\d[ ](?!\d\d0[ -]\d\d00)[2-9]\d\d[ -]\d{{4}} # 555 234 5678, but not 200 300 4000
      | 0[1-9](?:[ .-]\d\d){{4}}                                     # 06 12 34 56 78
      | 0[1-9]\d{{1,4}}[ /-]\d{{3,4}}[ -]?\d{{3,4}}                  # 020 7946 0958, 01234 567890
    ){_END}""",
    re.VERBOSE,
)

# Words that make a telephone number of a bare number beside them. Few, and of the languages that search logs hold most.
_CALL = (
    "call(?:s|ed|er|ing)?|phoned?|ph|telephone|tel|mobile|mob|cell|cellphone|whatsapp|sms|dial|fax|contact"  # English
    "|telefon(?:nummer)?|handy(?:nummer)?|rufnummer|anruf|anrufen|tél|téléphone|appel|appeler|telefoonnummer|bellen"  # de, fr, nl
    "|teléfono|telefono|telefone|celular|cellulare|móvil|llamar|ligar|chiamare"  # es, pt, it
    "|телефон(?:[ауые]|ом)?|тел|звонить|फोन|फ़ोन|मोबाइल|هاتف|جوال|واتساب"  # ru, hi, ar
)
_CALL_CJK = "(?:電話(?:番号)?|携帯)(?:は)?|(?:电话|手机)(?:号码?)?(?:是)?|전화(?:번호)?(?:는|은)?"  # words are not set apart there
# Small words between such a word and the number.
_LINK = "number|nummer|numéro|número|numero|no|nr|num|is|ist|me|us|at|on|from|to|the|this|le|au|il|al|lookup|номер|नंबर"
_BESIDE = re.compile(
    rf"""(?P<word>(?:(?<![^\W_])(?:{_CALL})(?![^\W\d_])|{_CALL_CJK})(?:[ :.#=(]{{1,2}}(?:{_LINK})(?![^\W\d_])){{0,3}}[ :.#=(]{{0,2}})
        (?:\d{{7,15}}|\d{{3}}[.-]\d{{4}}|(?!(?:19|20)\d\d[ -](?:19|20)\d\d)\d(?:[ .()/-]{{0,2}}\d){{8,14}}){_END}
      | (?<![\w.,/+@-])\d{{7,15}}(?P<after>[ ]-?[ ]?(?:(?:who|that|keeps?|is)[ ])?
        (?:call(?:s|ed|er|ing|(?![ ]of))|phoned|whatsapp|telefonnummer|(?:phone|mobile|cell|whatsapp)[ ](?:number|no))(?![^\W\d_]))""",
    re.VERBOSE,
)


class Redaction(NamedTuple):
    """The text without what was found, and whether each kind was."""

    text: str
    email: bool = False
    phone: bool = False
    card: bool = False

    @property
    def any(self) -> bool:
        """Whether something was taken out."""
        return self.email or self.phone or self.card


def has_placeholder(text: str) -> bool:
    """Whether a redacted text stands for many questions."""
    return "<" in text and _PLACEHOLDER.search(text) is not None


def redact(text: str) -> Redaction:
    """`text` (normalised) with personal data replaced; still normalised, and the same when done twice."""
    if not _FIRST.search(text) or not _MAYBE.search(text):
        return Redaction(text)
    clean, emails = _EMAIL.subn("<email>", text)
    clean, cards = _cards(clean)
    clean, phones = _PHONE.subn("<phone>", clean)
    clean, beside = _BESIDE.subn(lambda found: f"{found['word'] or ''}<phone>{found['after'] or ''}", clean)
    return Redaction(clean, emails > 0, beside + phones > 0, cards > 0)


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _cards(text: str) -> tuple[str, int]:
    kept: list[str] = []
    done = start = 0
    while match := _CARD.search(text, start):
        ends = [match.end(), *([match.end("four")] if match["four"] else [])]  # all 19 digits, or 16 and a security code
        end = next((end for end in ends if _is_card(text[match.start() : end])), 0)
        start = end or match.start() + 1
        if end:
            kept += [text[done : match.start()], "<card>"]
            done = end
    return "".join([*kept, text[done:]]), len(kept) // 2


def _is_card(written: str) -> bool:
    digits = written.replace(" ", "").replace("-", "")
    return _NETWORKS.fullmatch(digits) is not None and luhn(digits) and (len(digits) > 14 or len(written) > len(digits))
