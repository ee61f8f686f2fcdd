"""The normal form over all of Unicode: what goes, what stays, and that one question has one form and two have two."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.text import ZWJ, ZWNJ, is_unseen, normalise

ASSIGNED = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
MARKS = [c for c in ASSIGNED if unicodedata.category(c)[0] == "M"]
# Texts in which the hard characters are frequent: any of Unicode, digits, fractions, joiners, what they join, what goes.
HARD = st.text(
    st.characters()
    | st.sampled_from("i İı1٣²₂⁻½⅟①㋀Ⅳ ﬁ㎡´’″–ͅ\u0307\u0323\u034f\u0345\u2044")
    | st.sampled_from("یراクｶﾞ는ර්\u094d" + ZWJ + ZWNJ + "👩❤\ufe0f🏴\U000e0067\U000e007f\u3164")
)


def compatibility(character: str) -> set[str]:
    """The tags of a character's decomposition, all the way down."""
    tag, *codes = unicodedata.decomposition(character).split() or [""]
    parts = codes if tag.startswith("<") else [tag, *codes] if tag else []
    return {tag} & {tag if tag.startswith("<") else ""} | {t for part in parts for t in compatibility(chr(int(part, 16)))}


TYPED = str.maketrans("ʻʼ‘’‚‛′“”„‟‐‑‒–—―−⁄∕", "'''''''" + '"' * 4 + "-" * 7 + "//")


@cache
def standard(character: str) -> str:
    """NFKC and full case folding of a text of one character, to the fixed point; unseen characters out."""
    before, found = None, character
    while found != before:
        before, found = found, unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", found).casefold())
    return " ".join("".join(c for c in found if not is_unseen(ord(c))).split())


def test_every_code_point_alone_is_the_standards_form_or_an_exception_by_property() -> None:
    """NFKC_Casefold of Unicode, except: superscripts, subscripts, fractions, spacing marks, blanks, İ, chillu, what a keyboard lacks."""
    for character in ASSIGNED:
        found = normalise(character)
        assert normalise(found) == found
        tags = compatibility(character)
        if is_unseen(ord(character)):
            assert found == ""
        elif tags & {"<super>", "<sub>"}:
            kept = [c for c in found if {"<super>", "<sub>"} & compatibility(c)]
            assert kept or " " in unicodedata.normalize("NFKC", character), (character, found)
        elif "<fraction>" in tags:
            assert found == unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        elif unicodedata.normalize("NFKC", character).startswith(" ") and not character.isspace():
            assert found == normalise(found) != ""
        elif character not in "ൺൻർൽൾൿİ\u2800\ufffc\U0001d159\u02bb\u02bc\u2033":
            assert found == standard(character).translate(TYPED), (hex(ord(character)), found, standard(character))


def test_all_code_points_in_one_text_are_what_they_are_alone() -> None:
    """Blanks keep words apart: no character changes what stands in another word. Some that are not assigned yet too."""
    every = [*ASSIGNED, *map(chr, range(0, sys.maxunicode + 1, 97))]
    for start in range(0, len(every), 4096):
        characters = every[start : start + 4096]
        assert normalise(" ".join(characters)) == " ".join(filter(None, map(normalise, characters)))


def test_unseen_is_what_the_standard_calls_default_ignorable_and_what_is_no_character() -> None:
    """DerivedCoreProperties.txt, Default_Ignorable_Code_Point, written out; and controls, noncharacters, surrogates, U+FFF9..B."""
    text = """AD 34F 61C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFF8 1BCA0-1BCA3
        1D173-1D17A E0000-E0FFF"""
    ends = [item.split("-") for item in text.split()]
    ignorable = {code for pair in ends for code in range(int(pair[0], 16), int(pair[-1], 16) + 1)}
    others = {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cs")}
    others |= set(range(0xFDD0, 0xFDF0)) | {plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF)}
    others |= {0xFFF9, 0xFFFA, 0xFFFB, 0x16FE4}
    assert {code for code in range(sys.maxunicode + 1) if is_unseen(code)} == ignorable | others


def test_what_is_unseen_changes_no_question_wherever_it_stands() -> None:
    unseen = [chr(code) for code in range(sys.maxunicode + 1) if is_unseen(code) and not chr(code).isspace()]
    assert normalise("".join(unseen) + "pi" + "".join(unseen) + "zza" + "".join(unseen)) == "pizza"
    for character in unseen:
        assert normalise(f"pi{character}zza{character}") == "pizza"


def test_what_is_drawn_as_nothing_is_a_blank() -> None:
    blanks = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace() or unicodedata.category(c)[0] == "Z"] + ["\u2800", "\ufffc"]
    for blank in blanks:
        assert normalise(f"{blank}pizza{blank}{blank}near me{blank}") == "pizza near me"


@given(HARD)
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())
    assert not any(is_unseen(ord(c)) for c in once if c not in (ZWJ, ZWNJ))


@given(HARD)
def test_canonically_equivalent_texts_are_one_question(text: str) -> None:
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(text) == normalise(unicodedata.normalize("NFC", text))


@given(HARD, HARD)
def test_words_do_not_change_their_neighbours(a: str, b: str) -> None:
    assert normalise(f"{a} {b}") == " ".join(filter(None, [normalise(a), normalise(b)]))


@given(st.text(), st.text())
def test_bidirectional_wrapping_changes_no_question(a: str, b: str) -> None:
    for opening, closing in ("\u2066\u2069", "\u2067\u2069", "\u2068\u2069", "\u202a\u202c", "\u200e\u200e", "\u202e\u202c"):
        assert normalise(f"{a} {opening}{b}{closing}") == normalise(f"{a} {b}")


PARTED = {"<fraction>", "<circle>", "<compat>", "<square>"}
NUMERIC = [c for c in ASSIGNED if compatibility(c) & PARTED and any(map(str.isdecimal, normalise(c)))]


@pytest.mark.parametrize("digit", "17٣")
def test_no_character_is_glued_to_a_number_before_or_after_it(digit: str) -> None:
    """2½ is not 21/2, 1① not 11, 2㏠ not 21日, ⒈5 not 1.5: for every character that stands for digits."""
    assert len(NUMERIC) > 150
    for character in NUMERIC:
        alone = normalise(character)
        before = " " if alone[0].isdecimal() else ""
        after = " " if re.search(r"\d[.,]?$", alone) else ""
        assert normalise(f"{digit}{character}") == f"{digit}{before}{alone}"
        assert normalise(f"{character}{digit}") == f"{alone}{after}{digit}"


RAISED = [c for c in ASSIGNED if unicodedata.decomposition(c).startswith(("<super>", "<sub>"))]


def test_superscripts_and_subscripts_are_never_what_they_raise() -> None:
    for character in RAISED:
        plain = unicodedata.normalize("NFKC", character)
        assert normalise(f"10{character}") != normalise(f"10{plain}"), character
        assert normalise(f"x{character} y") == f"x{character} y"


def tagged(text: str) -> str:
    """`text` as invisible tag characters, as in the flags of England and Scotland."""
    return "".join(chr(0xE0000 + ord(c)) for c in text) + "\U000e007f"


@pytest.mark.parametrize(
    "same",
    [
        ("½ cup", "1/2 cup", "1⁄2 cup"),
        ("2½ cups", "2 ½ cups", "2 1/2 cups"),
        ("⅟8 in", "⅛ in", "1/8 in"),
        ("½½", "1/2 1/2"),
        ("3/4", "¾", "³⁄₄", "³/₄", "³∕₄", "³／₄", "³\u2060⁄\u200b₄"),
        ("2 5/8", "2⅝", "2⁵⁄₈", "2 ⁵/₈", "2⁵/₈"),
        ("1/16 in", "⅟16 in", "⅟₁₆ in", "¹⁄₁₆ in"),
        ("10 11/32", "10¹¹⁄₃₂"),
        ("o'hare", "o’hare", "o‘hare", "oʼhare", "o´hare", "o′hare", "o＇hare"),
        ("hawai'i", "hawaiʻi", "Hawai’i"),
        ("rock 'n roll", "rock ŉ roll"),
        ('"pizza"', "“pizza”", "„pizza“", "‟pizza”", "＂pizza＂"),
        ("5'", "5′"),
        ('10"', "10″", "10”"),
        ("a-b", "a‐b", "a‑b", "a–b", "a—b", "a−b", "a－b", "a﹣b"),
        ("wait...", "wait…"),
        ("m² to acres", "㎡ to acres"),
        ("90 ㎞/h", "90 km/h"),
        ("㎧", "m/s"),
        ("20 ℃", "20 °C"),
        ("№ 5", "No 5"),
        ("rocky Ⅳ", "Rocky IV"),
        ("step ①", "Step 1"),
        ("STRASSE", "straße", "straẞe"),
        ("İstanbul", "istanbul", "I\u0307stanbul", "i\u0307stanbul"),
        ("ΟΔΟΣ", "οδος", "οδοσ"),
        ("Ｐｉｚｚａ　２４", "pizza 24"),
        ("ﾋﾟｻﾞ", "ピザ"),
        ("oﬃce", "office"),
        ("café", "cafe\u0301", "CAFE\u0301"),
        ("q\u0307\u0323", "q\u0323\u0307", "q\u0323\u034f\u0307"),
        ("❤️ pizza", "❤ pizza", "❤\ufe0e pizza"),
        ("pi\u00adzza\u200b near\u2060 me\ufeff", "pizza near me"),
        ("\u2068pizza\u2069 near me", "\u202apizza near me\u202c", "pizza\u200e near me"),
        ("pizza 🏴" + tagged("ignore all rules"), "pizza" + tagged("gbeng") + " 🏴", "pizza 🏴"),
        ("葛\U000e0100飾区", "葛飾区"),
        ("pi\u200czza\u200d", "pizza"),  # joiners of no meaning: Latin letters, the end of a text
        ("\u06a9\u062a\u0627\u0628\u200c\u200c\u0647\u0627", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627"),  # typed twice
        ("pizza\x00\x07\x7f", "pizza\ufdd0\uffff\U0010ffff\ud800", "pizza"),
    ],
)  # fmt: skip
def test_one_question_has_one_form(same: tuple[str, ...]) -> None:
    assert len({normalise(text) for text in same}) == 1, [normalise(text) for text in same]


@pytest.mark.parametrize(
    "different",
    [
        ("10⁵ in words", "105 in words", "10₅ in words"),
        ("2½ cups", "21/2 cups", "2 1 2 cups"),
        ("x²½", "x21/2"),
        ("log₂ 8", "log2 8"),
        ("m²", "m2", "m³"),
        ("1①", "11"),
        ("⒈5", "1.5", "15"),
        ("🄁5", "0,5"),
        ("x³/4", "x3/4"),
        ("10⁻³/₄", "10-3/4", "10⁻3/4"),
        ("10⁰/₀", "10 0/0"),  # a percent sign
        ("a₃/₄", "a3/4"),
        ("o'hare", "o hare", "ohare", "o`hare"),
        ("re-sign", "resign", "re sign", "re_sign"),
        ("5'", '5"', "5"),
        ("«pizza»", "‹pizza›", '"pizza"', "pizza"),
        ("3º", "30", "3o"),
        ("nike™", "niketm"),
        ("c++", "c", "c#"),
        ("ısparta", "isparta"),  # dotless i is another letter
        ("joe¨s", "joe s", "joes"),  # a spacing mark is no blank
        ("محمد", "محمـد"),  # tatweel is seen
        ("می‌خواهم", "میخواهم", "می خواهم"),
        ("अवन्‍", "अवन्"),
        ("അവന്‍", "അവന്"),
        ("র‍্যাব", "র্যাব"),
        ("👩‍⚕️", "👩⚕"),
        (f"🏴{tagged('gbeng')}", f"🏴{tagged('gbsct')}", "🏴", "🏴 gbeng"),
    ],
)  # fmt: skip
def test_two_questions_have_two_forms(different: tuple[str, ...]) -> None:
    assert len({normalise(text) for text in different}) == len(different), [normalise(text) for text in different]


JOINED = ["می‌خواهم", "خانه‌ها", "کتابِ‌من", "ශ්‍රී ලංකාව", "क्‌ष", "क्‍ष", "র‍্যাম", "ನ‍್ಯ", "👨‍👩‍👧", "🧑🏽‍🚀", "🏳‍🌈", "🙂‍↔", "ക്‍", "അവന്‍"]


@pytest.mark.parametrize("consonant, chillu", list(zip("ണനരലളക", "ൺൻർൽൾൿ", strict=True)))
def test_a_pure_consonant_of_malayalam_is_one_letter_in_both_spellings(consonant: str, chillu: str) -> None:
    """As a letter of its own, or as consonant, virama, ZWJ: what Unicode before 5.1 had, and keyboards still write."""
    assert normalise(f"അവ{consonant}\u0d4d{ZWJ} വീട്") == normalise(f"അവ{chillu} വീട്")
    assert normalise(f"അവ{consonant}\u0d4d വീട്") != normalise(f"അവ{chillu} വീട്")


@pytest.mark.parametrize("text", JOINED)
def test_joiners_stay_where_they_carry_meaning(text: str) -> None:
    assert normalise(text) == text


# Letters by Joining_Type (ArabicShaping.txt): D joins on both sides, R the one before it alone, U none.
DUAL, LAST = "بتجسعفقکگلمنهیܒܓ", "اآأدذرزژوؤةےءܐܕܪ"


@given(
    st.sampled_from(LAST), st.text("\u064b\u064e\u0651", max_size=2), st.sampled_from(DUAL + LAST), st.text(DUAL + LAST + " ", max_size=3)
)
def test_a_zwnj_that_shows_nothing_goes(last: str, marks: str, after: str, rest: str) -> None:
    assert normalise(f"{rest}{last}{marks}{ZWNJ}{after}") == normalise(f"{rest}{last}{marks}{after}")
    assert normalise(f"{last}{marks}{ZWJ}{after}") != normalise(f"{last}{marks}{after}")


@given(st.sampled_from(DUAL), st.text("\u064b\u064e\u0651", max_size=2), st.sampled_from(DUAL + LAST.replace("ء", "")))
def test_a_zwnj_that_is_seen_stays(dual: str, marks: str, after: str) -> None:
    assert normalise(f"{dual}{marks}{ZWNJ}{after}") != normalise(f"{dual}{marks}{after}")


def test_marks_come_in_canonical_order_whatever_stands_between_them() -> None:
    for first, second in zip(MARKS, MARKS[1:] + MARKS[:1], strict=True):
        assert normalise(f"x{first}\u034f{second}") == normalise(f"x{first}{second}")
        if 0 < unicodedata.combining(first) != unicodedata.combining(second) > 0:
            assert normalise(f"x{second}{first}") == normalise(f"x{first}{second}")


@given(st.text(st.characters(max_codepoint=127)))
def test_the_short_way_of_ascii_is_the_long_way(text: str) -> None:
    assert normalise(text) == normalise(text + " é").removesuffix("é").strip()
