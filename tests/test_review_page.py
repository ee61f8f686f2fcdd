"""The review page in a real Chromium: decide with the keyboard alone, correct by form and by JSON, two people, hostile text, looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from chromium import Page, browser, needs_chromium
from headtail import review
from headtail.adapters.storage import Storage, open_storage
from headtail.core.keys import normalise, query_key
from headtail.core.task import Task, load_task
from headtail.review.desk import Desk
from headtail.review.label_draw import Config, record_draw
from headtail.review.labelling import label_desk
from headtail.review.log import LABELLING, DecisionLog
from headtail.review.queue import make_queue
from headtail.review.server import ReviewServer
from test_review import REF, intent, spans, suspect, suspects
from test_serve_page import CONTRAST

pytestmark = [pytest.mark.slow, needs_chromium]
MARKUP = "<img src=x onerror=alert(1)>"
MANY = 20_000

SEGMENTED = suspects(
    suspect(
        "joes barber shop sunday",
        spans(("joes barber shop", "topic"), ("sunday", "time")),
        40.0,
        alternatives=[spans(("joe's barber shop", "name"), ("sunday", "time")), '{"segments":[{"label":"place","text":"x"}]}'],
        reasons=["samples disagree: 3 of 5", "a label-less neighbour"],
        businesses=["Joe's Barber Shop", "Barber & Co"],
        count=1234,
    ),
    suspect("pizza near me", spans(("pizza near me", "topic")), 30.0),
    suspect(MARKUP, spans((MARKUP, "topic")), 20.0, reasons=[MARKUP], alternatives=[spans((MARKUP, "name"))]),
    suspect("never answered", None, 10.0, answer_key=None, confidence=None, agreement=None),
    side=["businesses"],
)


@contextmanager
def serving(store: Storage, task: Task, table: pa.Table) -> Iterator[str]:
    with ReviewServer(Desk(store, task, make_queue(table, REF, task.side_inputs), "anna")) as server:
        yield server.url


@pytest.fixture
def url(store: Storage, segmentation: Task) -> Iterator[str]:
    with serving(store, segmentation, SEGMENTED) as made:
        yield made


def key(page: Page, name: str, *, ctrl: bool = False, held: int = 0) -> None:
    """One key, as a keyboard sends it; `held`: how often it repeats before it goes up."""
    code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40}.get(name, ord(name[0].upper()))
    text = {"text": "\r" if name == "Enter" else name} if (len(name) == 1 or name == "Enter") and not ctrl else {}
    common = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
    for repeat in range(held + 1):
        page.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", autoRepeat=repeat > 0, **text, **common)
    page.call("Input.dispatchKeyEvent", type="keyUp", **common)


def at(page: Page, rank: int) -> None:
    page.until(f"row && row.rank === {rank} && !busy")


def decided(store: Storage, task: str = "query_segmentation") -> dict[str, tuple[str, str | None, str, str]]:
    return {row["query"]: (row["verdict"], row["answer"], row["who"], row["why"]) for row in review.decisions(store, task).to_pylist()}


def test_a_person_reviews_with_the_keyboard(url: str, store: Storage, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        assert page.text("#query") == "joes barber shop sunday"
        assert page.text("#traffic") == "1,234 events"
        assert page.js("[...document.querySelectorAll('#reasons li')].map(e => e.innerText)") == [
            "samples disagree: 3 of 5",
            "a label-less neighbour",
        ]
        assert "Joe's Barber Shop, Barber & Co" in page.text("#facts")
        chips = "[...document.querySelectorAll('#answers .answer:nth-child({}) .chip')].map(e => e.innerText.split('\\n'))"
        assert page.js(chips.format(1)) == [["joes barber shop", "topic"], ["sunday", "time"]]
        assert page.js(chips.format(2)) == [["joe's barber shop", "name"], ["sunday", "time"]]
        assert page.js("document.getElementById('who').value") == "anna"

        key(page, "2")  # not valid under the schema: it can be looked at, not taken
        assert page.js("document.getElementById('accept').disabled") is True
        key(page, "a")
        key(page, "1")
        assert page.text("#accept") == "Take 1 a"
        key(page, "w")
        page.type("spelling")
        key(page, "Enter")
        key(page, "a", held=5)  # held too long: decides once
        at(page, 2)
        taken = spans(("joe's barber shop", "name"), ("sunday", "time"))
        assert decided(store) == {"joes barber shop sunday": ("correct", taken, "anna", "spelling")}
        assert "1 of 4 rows decided · 40 % of the expected gain" in page.text("#figures")
        assert page.js("document.getElementById('bar').value") == 1
        assert "Corrected: joes barber shop sunday." in page.text("#said")

        key(page, "j")
        at(page, 3)
        key(page, "k")
        at(page, 2)
        key(page, "a")
        at(page, 3)
        key(page, "d")
        at(page, 4)
        key(page, "a")  # there is no answer to accept
        assert page.js("document.getElementById('accept').disabled") is True
        assert len(decided(store)) == 3

        key(page, "u")
        at(page, 3)
        assert page.js("document.querySelectorAll('#history .gone').length") == 1
        assert sorted(decided(store)) == ["joes barber shop sunday", "pizza near me"]
        key(page, "?")
        page.until("document.getElementById('help').open")
        key(page, "d")  # nothing is decided behind the list of keys
        key(page, "Escape")
        page.until("!document.getElementById('help').open")
        assert len(decided(store)) == 2

        key(page, "d")
        at(page, 4)
        key(page, "d")
        page.until("row === null && !busy")
        assert page.text("#query") == "No open row is left."
        assert "4 of 4 rows decided · 100 % of the expected gain" in page.text("#figures")
        key(page, "a")  # there is nothing to accept
        key(page, "j")
        page.until("!busy")
        key(page, "u")
        at(page, 4)
        assert page.problems == []
        assert page.hosts == {url.split("/")[2]}  # nothing but this server was asked


def test_spans_are_corrected_in_a_form(url: str, store: Storage, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        key(page, "j")
        at(page, 2)
        key(page, "c")
        page.until("document.activeElement.ariaLabel === 'Text of segment 1'")  # type at once; the c itself is not typed
        assert page.js("document.activeElement.value") == "pizza near me"
        page.js("document.activeElement.select()")
        page.type("pizza")
        page.js("document.getElementById('add').click()")
        page.type("near me")
        page.js("const s = document.querySelectorAll('#fields select')[1]; s.value = 'location'; s.dispatchEvent(new Event('change'))")
        key(page, "d")  # a letter in a field is a letter
        assert page.js("document.activeElement.value") == "near med"
        page.js("document.activeElement.value = 'near me'; document.activeElement.dispatchEvent(new Event('input'))")
        key(page, "Enter", ctrl=True)
        at(page, 3)
        assert decided(store)["pizza near me"][:2] == ("correct", spans(("pizza", "topic"), ("near me", "location")))

        key(page, "j")
        at(page, 4)
        key(page, "e")  # a row without an answer: the form starts empty
        page.until("document.activeElement.id === 'add'")
        key(page, "Escape")
        assert page.js("document.getElementById('edit').hidden") is True
        assert page.problems == []


def test_what_the_schema_refuses_is_not_recorded(url: str, store: Storage, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        key(page, "c")
        page.js("document.getElementById('as-json').click()")
        page.until("document.activeElement.id === 'json'")
        page.js("document.getElementById('json').select()")
        page.call("Input.insertText", text='{"segments": [{"text": "x", "label": "dish"}]}')
        page.until("document.getElementById('edit-problem').innerText.includes('dish')")  # said while typing
        assert page.js("document.getElementById('json').getAttribute('aria-invalid')") == "true"
        key(page, "Enter", ctrl=True)
        page.until("!busy && document.getElementById('edit-problem').innerText.startsWith('answer: schema')")
        assert page.js("row.rank") == 1
        assert decided(store) == {}
        page.js("document.getElementById('json').select()")
        page.call("Input.insertText", text='{"segments": [{"text": "x", "label": "topic"}]}')
        page.until("document.getElementById('edit-problem').innerText === ''")
        page.js("document.getElementById('save').click()")
        at(page, 2)
        assert decided(store)["joes barber shop sunday"][1] == spans(("x", "topic"))
        page.js("document.getElementById('who').value = ''")
        key(page, "a")
        page.until("!document.getElementById('problem').hidden")
        assert "every decision is recorded with a name" in page.text("#problem")
        assert [p for p in page.problems if "422" not in p] == []


def test_two_people_at_one_queue(store: Storage, segmentation: Task, tmp_path: Path) -> None:
    """Two servers on one store, as on two machines."""
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(open_storage(store.root), segmentation, SEGMENTED)) for _ in range(2)]
        anna, ben = (stack.enter_context(browser(tmp_path / name)) for name in ("anna", "ben"))
        for page, url, who in ((anna, urls[0], "anna"), (ben, urls[1], "ben")):
            page.open(url)
            at(page, 1)
            page.js(f"document.getElementById('who').value = '{who}'")
        key(anna, "d")
        at(anna, 2)
        key(ben, "a")
        at(ben, 2)
        assert "anna has dropped it too" in ben.text("#said")
        assert decided(store)["joes barber shop sunday"][2] == "ben"
        assert review.decision_history(store, "query_segmentation")["who"].to_pylist() == ["anna", "ben"]
        key(ben, "d")
        at(ben, 3)
        key(anna, "j")
        at(anna, 3)
        assert "2 of 4 rows decided" in anna.text("#figures")
        anna.js("const s = document.getElementById('show'); s.value = 'decided'; s.dispatchEvent(new Event('change'))")
        at(anna, 1)
        assert anna.js("[...document.querySelectorAll('#near .badge')].map(e => e.innerText)") == ["accepted", "dropped"]


def test_a_server_that_is_gone_is_said(store: Storage, segmentation: Task, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        with serving(store, segmentation, SEGMENTED) as url:
            page.open(url)
            at(page, 1)
        key(page, "d")
        page.until("!document.getElementById('problem').hidden")
        assert "No connection" in page.text("#problem")
        assert page.js("row.rank") == 1


def test_text_is_never_markup(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        key(page, "j")
        at(page, 2)
        key(page, "j")
        at(page, 3)
        assert page.text("#query") == MARKUP
        assert page.text("#reasons li") == MARKUP
        key(page, "c")
        page.js("document.getElementById('who').value = '<b>x</b>'")
        key(page, "Escape")
        key(page, "d")
        at(page, 4)
        page.js("go(2, 0)")
        page.until("row && row.rank === 3")
        assert "<b>x</b>" in page.text("#history")
        assert page.js("document.querySelectorAll('main img, main b').length") == 0
        assert page.problems == []


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_it_looks_right(url: str, tmp_path: Path, look: str) -> None:
    with browser(tmp_path / "profile", width=390 if look == "phone" else 1100, dark=look == "dark") as page:
        page.open(url)
        at(page, 1)
        for step in ("1", "d", "k", "c", ""):  # chosen, decided, decided before, correcting
            if step == "k":
                at(page, 2)
                page.js("go(0, 0)")
                at(page, 1)
            elif step:
                key(page, step)
            assert page.js("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
            thin = page.js(CONTRAST)
            assert thin == [], f"too little contrast: {thin}"
        assert page.js(NAMELESS) == []
        assert len(page.picture(tmp_path / f"{look}.png")) > 10_000


@contextmanager
def labelling(root: str, task: str, folder: Path) -> Iterator[str]:
    """The page of three drawn queries."""
    file = folder / "draw.csv"
    said = {"design": "census", "stratum": "head"}
    queries = ("pizza near me", normalise(MARKUP), "how much")
    record_draw(open_storage(root), load_task(task).name, [{"query": one, "query_key": query_key(one).hex(), **said} for one in queries])
    file.write_text(f"query,answer,stratum,events\npizza near me,,head,1234\n{MARKUP},,tail,2\nhow much,,unseen,1\n")
    with ReviewServer(label_desk(Config(root=root, task=task, who="anna"), file)) as server:
        yield server.url


def labelled(store: Storage, task: str) -> dict[str, tuple[str, str | None, str]]:
    rows = [kept.decision for kept in DecisionLog(store, task, LABELLING).current_decisions()]
    return {row.query: (row.verdict, row.answer, row.who) for row in rows}


def choose(page: Page, number: int, value: str) -> None:
    page.js(
        f"{{const s = document.querySelectorAll('#fields select')[{number}]; s.value = '{value}'; s.dispatchEvent(new Event('change'))}}"
    )


def test_drawn_queries_are_labelled(store: Storage, root: str, tmp_path: Path) -> None:
    with labelling(root, "query_segmentation", tmp_path) as url, browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        assert (page.text("#title"), page.text("#query"), page.text("#stratum"), page.text("#traffic")) == (
            "headtail labels",
            "pizza near me",
            "head",
            "1,234 events",
        )
        hidden = "['accept', 'correct', 'answers', 'suspect'].filter(id => document.getElementById(id).getClientRects().length)"
        assert page.js(hidden) == []  # there is no answer to look at
        assert "gain" not in page.text("#figures")
        assert page.js("[document.activeElement.ariaLabel, document.activeElement.value]") == ["Text of segment 1", "pizza near me"]
        key(page, "Enter", ctrl=True)  # no label is chosen for anybody
        page.until("!busy && document.getElementById('edit-problem').innerText.includes('label')")
        page.js("document.activeElement.select()")
        page.type("pizza")
        page.js("document.getElementById('add').click()")
        assert page.js("[document.activeElement.ariaLabel, document.activeElement.value]") == ["Text of segment 2", "near me"]
        choose(page, 0, "topic")
        choose(page, 1, "location")
        key(page, "Enter", ctrl=True)
        at(page, 2)
        assert labelled(store, "query_segmentation") == {
            "pizza near me": ("correct", spans(("pizza", "topic"), ("near me", "location")), "anna")
        }
        assert page.text("#query") == MARKUP
        assert page.js("document.activeElement.ariaLabel") == "Text of segment 1"  # the next one is typed at once
        key(page, "Escape")
        key(page, "d")
        at(page, 3)
        assert labelled(store, "query_segmentation")[MARKUP] == ("drop", None, "anna")
        assert "2 of 3 rows decided · 1 answered · 1 skipped" in page.text("#figures")
        page.js("document.getElementById('undo').click()")  # also while the form is open
        at(page, 2)
        assert sorted(labelled(store, "query_segmentation")) == ["pizza near me"]
        assert "Taken back: skipped" in page.text("#said")
        page.js("go(0, 0)")
        at(page, 1)
        assert page.js("document.getElementById('edit').hidden") is True  # what was answered is not opened
        key(page, "c")  # it can be changed
        page.until("!document.getElementById('edit').hidden")
        assert page.js("[...document.querySelectorAll('#fields input')].map(e => e.value)") == ["pizza", "near me"]
        choose(page, 1, "none")
        key(page, "Enter", ctrl=True)
        at(page, 2)
        assert labelled(store, "query_segmentation")["pizza near me"][1] == spans(("pizza", "topic"), ("near me", "none"))
        assert [problem for problem in page.problems if "422" not in problem] == []
        assert decided(store) == {}


def test_a_label_is_chosen_by_a_person(store: Storage, root: str, tmp_path: Path) -> None:
    with labelling(root, "query_intent", tmp_path) as url, browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        assert page.js("[document.activeElement.ariaLabel, document.activeElement.value]") == ["Label", ""]
        key(page, "Enter", ctrl=True)
        page.until("!busy && document.getElementById('edit-problem').innerText.includes('intent')")
        for rank, value in enumerate(("near_me", "browse", "price"), 2):
            choose(page, 0, value)
            key(page, "Enter", ctrl=True)
            page.until(f"!busy && ({f'row && row.rank === {rank}' if rank < 4 else 'row === null'})")
        assert "headtail labels read" in page.text("#note")
        assert labelled(store, "query_intent")["how much"] == ("correct", intent("price"), "anna")


def test_an_answer_as_json_begins_with_its_fields(store: Storage, root: str, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "prompt.j2").write_text("{% block system %}Brand?{% endblock %}{% block user %}{{ query }}{% endblock %}")
    fields = "{brand: {type: string, maxLength: 20}, size: {type: integer, minimum: 0, maximum: 9}}"
    schema = f"{{type: object, properties: {fields}, required: [brand], additionalProperties: false}}"
    (folder / "task.yaml").write_text(f"name: answers\nanswer: {schema}\nscore: {{kind: exact}}\nfallback: {{brand: x}}\n")
    with labelling(root, str(folder), tmp_path) as url, browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        assert json.loads(page.js("document.activeElement.value")) == {"brand": None, "size": None}
        page.js("document.activeElement.select()")
        page.call("Input.insertText", text='{"brand": "bosch"}')
        key(page, "Enter", ctrl=True)
        at(page, 2)
        assert labelled(store, "answers")["pizza near me"][1] == '{"brand":"bosch"}'
        assert page.problems == []


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_labelling_looks_right(root: str, tmp_path: Path, look: str) -> None:
    with (
        labelling(root, "query_segmentation", tmp_path) as url,
        browser(tmp_path / "profile", width=390 if look == "phone" else 1100, dark=look == "dark") as page,
    ):
        page.open(url)
        at(page, 1)
        for step in ("", "Escape", "d", "k"):  # the form, without it, the next one, one that is skipped
            if step == "k":
                page.js("go(0, 0)")
                at(page, 1)
            elif step:
                key(page, step)
                at(page, 2 if step == "d" else 1)
            assert page.js("document.documentElement.scrollWidth <= innerWidth")
            thin = page.js(CONTRAST)
            assert thin == [], f"too little contrast: {thin}"
            assert page.js(NAMELESS) == []


# Every control says what it is to those who do not see it.
NAMELESS = """[...document.querySelectorAll("button, input, select, textarea")].filter(e => e.getClientRects().length)
  .filter(e => !e.innerText.trim() && !e.ariaLabel && !(e.labels && e.labels.length)).map(e => e.outerHTML.slice(0, 80))"""


def test_many_thousand_rows(store: Storage, tmp_path: Path) -> None:
    labels = ["browse", "price", "how_to"]
    rows = [
        suspect(f"query number {i}", intent(labels[i % 3]), float(MANY - i), alternatives=[intent(labels[(i + 1) % 3])])
        for i in range(MANY)
    ]
    with serving(store, load_task("query_intent"), suspects(*rows)) as url, browser(tmp_path / "profile") as page:
        page.open(url)
        at(page, 1)
        assert page.text("#place") == "1 of 20,000"
        page.js("go(19998, 0)")
        at(page, 19_999)
        assert page.js("document.querySelectorAll('#near li').length") == 5  # a window, not the queue
        key(page, "c")
        page.until("document.activeElement.ariaLabel === 'Label'")
        key(page, "h")  # a select goes to what begins so
        page.js("document.activeElement.value = 'how_to'; document.activeElement.dispatchEvent(new Event('change'))")
        key(page, "Enter", ctrl=True)
        at(page, 20_000)
        key(page, "a")
        at(page, 1)  # from the end back to what was passed over
        assert decided(store, "query_intent")["query number 19998"][1] == intent("how_to")
        started = page.js("performance.now()")
        for rank in range(2, 22):
            key(page, "a")
            at(page, rank)
        assert page.js("performance.now()") - started < 20_000  # a second each would be no way to work
        assert json.loads(page.js("JSON.stringify(row.progress)"))["decided"] == 22
        assert page.problems == []
