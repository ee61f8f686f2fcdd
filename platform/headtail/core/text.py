"""The normal form of a text: one question has one form, two questions have two.

In: text as people type it. Out: the form in which queries are counted, keyed and looked up. All decisions follow character
properties of Python's unicodedata, read when a character is first met (docs/text.md lists them); only what that module does not have
is listed here: the default-ignorable code points outside category Cf. Knows nothing of keys or personal data.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

NORMALISATION = 4  # part of every fingerprint that depends on `normalise`; raise it when the function changes

_ROUNDS = 8  # a bound: of two million random texts of hard characters none took more than 4
_REMEMBERED = 1 << 16  # code points; Unicode 17 assigns 160,000, one log uses a few thousand

# Unicode 17.0, PropList.txt: Other_Default_Ignorable_Code_Point and Variation_Selector. U+16FE4 is a filler that is in neither.
_IGNORABLE = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x3164, 0x3164), (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF), (0x16FE4, 0x16FE4),
)  # fmt: skip
# Category Cf that is seen: Prepended_Concatenation_Mark (PropList.txt) and the format controls of Egyptian hieroglyphs.
_SEEN_FORMAT = (
    (0x0600, 0x0605), (0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x110BD, 0x110BD), (0x110CD, 0x110CD),
    (0x13430, 0x1343F),
)  # fmt: skip
_BLANK = {0x2800, 0xFFFC, 0x1D159}  # drawn as nothing, but wide: braille blank, place of a lost object, null notehead
_FLAGS = {"gbeng": "England", "gbsct": "Scotland", "gbwls": "Wales"}  # the tag sequences of emoji 16.0: all others are hidden text

# What phones and word processors put for the signs of a keyboard, and what people type for them.
_KEYBOARD = {
    "'": "\u00b4\u02bb\u02bc\u2018\u2019\u201a\u201b\u2032",  # acute accent, letters, quotation marks, prime
    '"': "\u201c\u201d\u201e\u201f\u2033",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212",  # hyphens, dashes, minus
    "/": "\u2044\u2215",  # of fractions and of division: "½" is "1/2", "㎧" is "m/s"
}
_TYPED = {sign: key for key, signs in _KEYBOARD.items() for sign in signs}

ZWNJ, ZWJ = "\u200c", "\u200d"
_JOINERS = re.compile(f"[{ZWNJ}{ZWJ}]+")
# Malayalam has two spellings of a consonant without its vowel: a letter of its own (since Unicode 5.1), or consonant, virama, ZWJ.
_CHILLU = {
    letter: f"{consonant}\u0d4d{ZWJ}"
    for letter, consonant in zip("\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e\u0d7f", "\u0d23\u0d28\u0d30\u0d32\u0d33\u0d15", strict=True)
}
_DOTTED = re.compile("i\u0307+")  # İ case-folds to i with a second dot
_FLAG = re.compile("\U0001f3f4((?:{}))\U000e007f".format("|".join("".join(chr(0xE0000 + ord(c)) for c in name) for name in _FLAGS)))
_SEAM = "\0"  # around what one character stands for, while its neighbours are looked at; U+0000 itself never gets that far
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉"
_FRACTION = re.compile(rf"(?<![\u207a-\u207e])([{_RAISED}]+|(?<={_SEAM})1)/([{_LOWERED[1:]}][{_LOWERED}]*)")
_DIGITS = str.maketrans(_RAISED + _LOWERED, 2 * "0123456789")
_BETWEEN_DIGITS = re.compile(rf"(?:(?<=\d)|(?<=\d[.,])){_SEAM}+(?=\d)")

# First words of names of the scripts whose letters join one another, beside those that have a virama.
_CURSIVE = frozenset(
    ["ADLAM", "ARABIC", "CHORASMIAN", "HANIFI", "MANDAIC", "MANICHAEAN", "MONGOLIAN", "NKO", "PHAGS-PA", "PSALTER", "SOGDIAN", "SYRIAC"]
)

# Letters of the Arabic, Syriac and Mandaic blocks that never join the one after them: Joining_Type R or U (ArabicShaping.txt, Unicode 14).
_LAST = (
    (0x0621, 0x0625), (0x0627, 0x0627), (0x0629, 0x0629), (0x062F, 0x0632), (0x0648, 0x0648), (0x0671, 0x0677), (0x0688, 0x0699),
    (0x06C0, 0x06C0), (0x06C3, 0x06CB), (0x06CD, 0x06CD), (0x06CF, 0x06CF), (0x06D2, 0x06D3), (0x06D5, 0x06D5), (0x06E5, 0x06E6),
    (0x06EE, 0x06EF), (0x0710, 0x0710), (0x0715, 0x0719), (0x071E, 0x071E), (0x0728, 0x0728), (0x072A, 0x072A), (0x072C, 0x072C),
    (0x072F, 0x072F), (0x074D, 0x074D), (0x0759, 0x075B), (0x076B, 0x076C), (0x0771, 0x0771), (0x0773, 0x0774), (0x0778, 0x0779),
    (0x0840, 0x0840), (0x0846, 0x0847), (0x0849, 0x0849), (0x0854, 0x0854), (0x0856, 0x0858), (0x0861, 0x0861), (0x0866, 0x0867),
    (0x0869, 0x086A), (0x0870, 0x0882), (0x0887, 0x0887), (0x088E, 0x088E), (0x08AA, 0x08AE), (0x08B1, 0x08B2), (0x08B9, 0x08B9),
    (0x08C9, 0x08C9),
)  # fmt: skip


def normalise(text: str) -> str:
    """The form in which queries are counted and looked up: case-folded, composed, nothing unseen, single blanks.

    Idempotent: `normalise(normalise(x)) == normalise(x)`. Punctuation stays: "c++" is not "c". Compatibility characters become
    what they stand for, as in NFKC, except superscripts and subscripts, which stay ("10⁵" is not "105") but in
    fractions. Typographic quotes, hyphens and dashes become those of a keyboard.
    """
    if text.isascii():
        if not text.isprintable():
            text = text.translate(_TABLE)
        return " ".join(text.lower().split())
    for _ in range(_ROUNDS):  # case folding can open a new form (U+0345 does)
        before, text = text, _once(text)
        if text == before or text.isascii():
            break
    return text


def _once(text: str) -> str:
    if "\U000e007f" in text:
        text = _FLAG.sub(lambda flag: "\U0001f3f4" + "".join(chr(ord(c) - 0xE0000) for c in flag[1]), text)
    text = text.translate(_TABLE)
    if "/" in text:
        text = _FRACTION.sub(_plain_fraction, text)
    text = unicodedata.normalize("NFC", text)
    if _SEAM in text:
        text = _BETWEEN_DIGITS.sub(" ", text).replace(_SEAM, "")
    if ZWNJ in text or ZWJ in text:
        text = _JOINERS.sub(_joiner, text)
    text = unicodedata.normalize("NFC", text.casefold())
    return " ".join(_DOTTED.sub("i", text).split())


def _plain_fraction(found: re.Match[str]) -> str:
    """A fraction of raised and lowered digits as the character for it would be: "³/₄" is "¾"."""
    return f"{_SEAM}{found[0].translate(_DIGITS)}{_SEAM}"


class _Table(dict[int, str | int | None]):
    """For str.translate: what each code point becomes, worked out when it is first met."""

    def __missing__(self, code: int) -> str | int | None:
        found = _becomes(code)
        if len(self) < _REMEMBERED:
            self[code] = found
        return found


_TABLE = _Table()


def _becomes(code: int) -> str | int | None:
    """What stands for a code point: None when it goes, the code point itself when it stays."""
    character = chr(code)
    if character.isspace() or code in _BLANK:
        return " "
    if character in (ZWNJ, ZWJ):
        return code
    if is_unseen(code):
        return None
    if character in _CHILLU:
        return _CHILLU[character]
    plain = _expand(character)
    if plain == character:
        return code
    if unicodedata.decomposition(character).split(" ")[0] not in ("<fraction>", "<circle>", "<compat>", "<square>"):
        return plain  # other forms of digits are digits: "２４" is "24"
    ends = plain[-1].isdecimal() or (plain[-1] in ".," and plain[-2:-1].isdecimal())
    return f"{_SEAM * plain[0].isdecimal()}{plain}{_SEAM * ends}"  # "2½" must not become "21/2", nor "1①" "11", nor "⒈5" "1.5"


def is_unseen(code: int) -> bool:
    """Whether a code point shows nothing and takes no room: default-ignorable, control, noncharacter, half a surrogate pair."""
    category = unicodedata.category(chr(code))
    if category == "Cf":
        return not _within(code, _SEEN_FORMAT)
    return category in ("Cc", "Cs") or _within(code, _IGNORABLE) or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= code <= last for first, last in ranges)


def _expand(character: str) -> str:
    """The compatibility decomposition, superscripts and subscripts kept, and kept whole what would become a blank with a mark."""
    if character in _TYPED:
        return _TYPED[character]
    tag, *codes = unicodedata.decomposition(character).split() or [""]
    if not tag or tag in ("<super>", "<sub>"):
        return character
    if not tag.startswith("<"):  # canonical: composed again by NFC, unless a part of it stands for something else
        codes = [tag, *codes]
    parts = [chr(int(code, 16)) for code in codes]
    if parts[0] == " " and len(parts) > 1:
        return character  # a spacing mark, such as the diaeresis
    plain = "".join(map(_expand, parts))
    if tag.startswith("<"):
        return plain
    return character if plain == unicodedata.normalize("NFD", character) else unicodedata.normalize("NFC", plain)


def _joiner(run: re.Match[str]) -> str:
    """The first joiner of a run where it carries meaning, else nothing."""
    before, after = run.string[max(0, run.start() - 1) : run.start()], run.string[run.end() : run.end() + 1]
    joiner = run[0][0]
    if joiner == ZWJ and before and unicodedata.combining(before) == 9:
        return joiner  # after a virama: half forms, the chillu letters of Malayalam, also at the end of a word
    if not before or not after or (joiner == ZWNJ and _apart(run.string[: run.start()], after)):
        return ""
    kept = (_joins(before) and _joins(after)) or (joiner == ZWJ and _in_emoji(before) and _in_emoji(after))
    return joiner if kept else ""


def _apart(before: str, after: str) -> bool:
    """Whether the last letter of `before`, marks aside, does not join the letter after it anyway: a ZWNJ between them shows nothing."""
    letter = next((character for character in reversed(before) if unicodedata.category(character)[0] != "M"), " ")
    return _within(ord(letter), _LAST) and unicodedata.category(after)[0] == "L"


@lru_cache(1 << 12)
def _joins(character: str) -> bool:
    """Whether it is a letter or mark of a script whose letters join."""
    if unicodedata.category(character)[0] not in "LM":
        return False
    script = unicodedata.name(character, "").split(" ")[0]
    return script in _CURSIVE or script in _with_virama()


@lru_cache(1)
def _with_virama() -> frozenset[str]:
    """First words of names of the scripts that have a virama (canonical combining class 9)."""
    codes = (code for first, last in ((0x0900, 0x1FFF), (0xA800, 0xABFF), (0x10A00, 0x11FFF)) for code in range(first, last + 1))
    return frozenset(unicodedata.name(chr(code)).split(" ")[0] for code in codes if unicodedata.combining(chr(code)) == 9)


def _in_emoji(character: str) -> bool:
    """Whether it can be part of an emoji sequence: a symbol, arrow or skin tone."""
    return character > "\u2190" and unicodedata.category(character)[0] == "S"
