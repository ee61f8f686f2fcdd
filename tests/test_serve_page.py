"""The try-it page in a real Chromium: answers, chips, badges, keyboard, hostile text, light and dark, a narrow screen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chromium import browser, needs_chromium
from fronts import Front
from headtail.adapters.storage import open_storage
from headtail.core.task import Task, load_task
from headtail.releases import release
from headtail.stages import serve
from headtail.stages.serve.admin import PAGE
from headtail.stages.serve.admission import KeyAdmission
from headtail.stages.serve.answerer import REASONS, Miss, MissFailed, RealtimeReply
from headtail.stages.serve.api_keys import add_key
from local_server import Running
from test_cache import answers, good, publish
from test_feedback import Logged, rows_of
from test_serve import published
from test_serve import segments as plain

pytestmark = [pytest.mark.slow, needs_chromium]
MARKUP = "<img src=x onerror=alert(1)>"


def segments(*pairs: tuple[str, str]) -> str:
    return json.dumps({"segments": [{"label": label, "text": text} for text, label in pairs]})


def serving(folder: Path, task: Task, rows: Sequence[tuple[str, str]], realtime: Mapping[str, str], **options: Any) -> Front:
    """`rows` from the cache, `live` from the student, anything else makes the student fail."""
    store = open_storage(str(folder / "store"))
    _, manifest = publish(store, folder, answers(*(good(query, answer) for query, answer in rows)))
    release.promote(store, release.make_release(store, snapshot=manifest.id, task=task, student="distill/0123456789abcdef").id)

    async def student(miss: Miss) -> RealtimeReply:
        if miss.clean not in realtime:
            raise MissFailed("timeout")
        return RealtimeReply(realtime[miss.clean], "stop", 0.83, "ab" * 16, "distill/0123456789abcdef", task.fingerprint)

    return Front(store, serve.Config(release=release.current_id(store)), folder, student, **options)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cached = [
        ("pizza near me", segments(("pizza", "topic"), ("near me", "location"))),
        ("how late is the drug store open", segments(("how late", "question"), ("drug store", "topic"), ("open", "none"))),
        ("joes barber shop sunday", segments(("joe's barber shop", "name"), ("sunday", "time"))),
    ]
    realtime = {"vegan ramen kreuzberg tonight": segments(("vegan ramen", "topic"), ("kreuzberg", "location"), ("tonight", "time"))}
    realtime |= {MARKUP: segments((MARKUP, "topic"))}
    with Running(serving(tmp_path_factory.mktemp("page"), load_task("query_segmentation"), cached, realtime).pages()) as server:
        yield server.url


def test_a_person_tries_it(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        page.until("!document.getElementById('examples').hidden")
        assert page.js("document.activeElement.id") == "query"  # type at once
        assert page.js("document.getElementById('key').offsetParent") is None  # no key is wanted, so its field is not seen
        page.type("Pizza near me")
        page.press("Enter")
        page.until("document.getElementById('badge').innerText.startsWith('cache')")
        assert page.text("#badge") == "cache: teacher"
        chips = "[...document.querySelectorAll('.chip')].map(e => e.innerText.split('\\n'))"
        assert page.js(chips) == [["pizza", "topic"], ["near me", "location"]]
        colours = page.js("[...document.querySelectorAll('.chip')].map(e => getComputedStyle(e).backgroundColor)")
        assert len(set(colours)) == 2
        assert "looked up as “pizza near me”" in page.text("#note")
        assert "ms in the server" in page.text("#figures")
        assert json.loads(page.js("document.getElementById('json').textContent"))["cached"] is True

        page.js("document.activeElement.blur()")
        page.press("/")
        assert page.js("document.activeElement.id") == "query"
        assert page.js("document.getElementById('query').value") == "Pizza near me"  # the slash itself is not typed
        page.type("vegan ramen kreuzberg tonight")  # over the selected text
        page.press("Enter")
        page.until("document.getElementById('badge').innerText === 'realtime student'")
        assert "confidence 0.83" in page.text("#figures")

        page.press("ArrowUp")
        page.press("ArrowUp")
        assert page.js("document.getElementById('query').value") == "Pizza near me"
        page.press("ArrowDown")
        assert page.js("document.getElementById('query').value") == "vegan ramen kreuzberg tonight"

        page.js("document.querySelectorAll('#examples button')[0].click()")
        page.until("document.getElementById('badge').innerText.startsWith('cache')")
        assert page.js("document.querySelectorAll('#recent li').length") == 3
        assert "distill/0123456789abcdef" in page.text("#release")
        assert page.problems == []
        assert page.hosts == {url.removeprefix("http://")}  # nothing but this server was asked


def test_a_server_with_keys_asks_for_one(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "person", ["answer"])
    cached = [("pizza", segments(("pizza", "topic")))]
    front = serving(tmp_path, load_task("query_segmentation"), cached, {}, admit=KeyAdmission(tmp_path / "keys", tmp_path / "limits"))
    with Running(front.pages()) as server, browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.until("!document.getElementById('keyrow').hidden")
        assert "API key" in page.text("#release")
        page.js("document.getElementById('query').focus()")
        page.type("pizza")
        page.press("Enter")
        page.until("document.getElementById('note').className === 'bad'")
        assert "needs a valid API key" in page.text("#note")
        assert page.js("document.activeElement.id") == "key"
        page.type(key)
        page.js("document.activeElement.blur()")
        page.until("!document.getElementById('examples').hidden")
        page.js("document.querySelectorAll('#examples button')[0].click()")
        page.until("document.getElementById('badge').innerText === 'cache: teacher'")
        assert page.js("localStorage.length") == 0, "a key is kept for this tab alone"


def test_what_goes_wrong_is_said(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        page.type("zzz")
        page.press("Enter")
        page.until("document.getElementById('badge').innerText === 'fallback'")
        assert "the student took too long" in page.text("#note")
        page.js("document.getElementById('query').select()")
        page.type("x" * 201)
        page.press("Enter")
        page.until("document.getElementById('note').className === 'bad'")
        assert "at most 200 are taken" in page.text("#note")
        assert page.js("document.getElementById('badge').hidden") is True
        assert [p for p in page.problems if "422" not in p] == []


def test_what_differs_from_the_query_is_shown(url: str, tmp_path: Path) -> None:
    """A corrected spelling is in the answer and not in the query: whoever tries it must not take it for what was typed."""
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/?query=joes+barber+shop+sunday")
        page.until("document.querySelectorAll('.chip').length === 2")
        assert page.text("#note") == "not as typed: “joe's barber shop”"
        page.js("document.querySelectorAll('#examples button')[0].click()")
        page.until("!document.getElementById('note').innerText.includes('typed')")
        page.js("document.getElementById('query').select()")
        page.type("Mail Jane.Doe@example.com tonight")
        page.press("Enter")
        page.until("document.getElementById('badge').innerText === 'fallback'")
        assert "degraded: personal data was taken out" in page.text("#note")
        assert "looked up as “mail <email> tonight”" in page.text("#note")
        page.picture(tmp_path / "degraded.png")
        assert page.problems == []


def test_a_person_says_whether_an_answer_is_right(tmp_path: Path) -> None:
    """Two clicks on the page are two rows of feedback in the store, about the requests that were shown."""
    store, task = open_storage(str(tmp_path / "store")), load_task("query_segmentation")
    published(store, tmp_path, task)
    front = Logged(store, tmp_path, task)
    with Running(front.pages()) as server, browser(tmp_path / "profile") as page:
        page.open(server.url)
        assert page.js("document.getElementById('verdict').offsetParent") is None
        for query, button in (("Pizza near me", "up"), ("something rare", "down")):
            page.js("document.getElementById('query').select()")
            page.type(query)
            page.press("Enter")
            page.until(f"document.getElementById('recent').innerText.includes('{query}')")
            page.js(f"document.getElementById('{button}').click()")
            page.until("document.getElementById('thanks').innerText.startsWith('noted')")
            assert page.js("document.getElementById('up').disabled && document.getElementById('down').disabled")
        page.picture(tmp_path / "feedback.png")
        assert page.problems == []
    front.collect()
    front.close()
    rows = {row["query"]: row for row in rows_of(store, "feedback")}
    assert {query: row["rating"] for query, row in rows.items()} == {"pizza near me": "up", "something rare": "down"}
    assert json.loads(rows["something rare"]["shown"]) == plain("rare")
    assert rows["pizza near me"]["answer_key"]


def test_every_reason_of_the_server_has_words_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    words = text[text.index("const WHY") : text.index("};", text.index("const WHY"))]
    assert [reason for reason in REASONS if not re.search(rf"\b{reason}: \"", words)] == []


def test_text_is_never_markup(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        page.type(MARKUP)
        page.press("Enter")
        page.until("document.querySelectorAll('.chip').length === 1")
        assert page.text(".chip span") == MARKUP
        assert page.js("document.querySelectorAll('main img').length") == 0
        assert page.problems == []


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_it_looks_right(url: str, tmp_path: Path, look: str) -> None:
    width = 390 if look == "phone" else 1000
    with browser(tmp_path / "profile", width=width, dark=look == "dark") as page:
        page.open(f"{url}/?query=how+late+is+the+drug+store+open")
        page.until("document.querySelectorAll('.chip').length === 3")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
        thin = page.js(CONTRAST)
        assert thin == [], f"too little contrast: {thin}"
        assert len(page.picture(tmp_path / f"{look}.png")) > 10_000


# Every text on the page against the colour behind it: WCAG AA, 4.5:1.
CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.className === "visually-hidden" || e.tagName === "SCRIPT") continue;
    const s = getComputedStyle(e), opacity = Number(s.opacity), back = behind(e);
    const front = parse(s.color).slice(0, 3).map((v, i) => v * opacity + back[i] * (1 - opacity));
    const [a, b] = [lum(front), lum(back)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push(`${e.tagName}#${e.id}.${e.className} ${ratio.toFixed(2)} ${e.textContent.trim().slice(0, 30)}`);
  }
  return found;
})()"""


def test_other_tasks_are_drawn_too(tmp_path: Path) -> None:
    front = serving(tmp_path, load_task("query_intent"), [("pizza price", '{"intent": "price"}')], {})
    with Running(front.pages()) as server, browser(tmp_path / "profile") as page:
        page.open(f"{server.url}/?query=pizza+price")
        page.until("document.querySelectorAll('#chips .label').length === 1")
        assert page.text("#chips") == "price"
        assert page.text("#task") == load_task("query_intent").file.description


def test_the_api_docs_work_without_a_network(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(f"{url}/docs")
        page.until("document.querySelectorAll('.opblock').length >= 5")
        assert page.hosts == {url.removeprefix("http://")}
