"""Prompt templates: what one may do, what is refused with its line, and that none can hold up a job or reach out of its values."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headtail.core.errors import ConfigError
from headtail.core.prompt import Prompt, PromptError, read_template
from timescale import limit

VALUES = {"query": "pizza near me", "shops": ["blue fox", "red owl"]}
USER = "{% block user %}{{ query }}\nREST{% endblock %}"


def render(text: str) -> str:
    return Prompt(text, list(VALUES)).messages(VALUES)[-1]["content"]


@pytest.mark.parametrize(
    "rest, shown",
    [
        ("{{ shops | join('; ') }}", "blue fox; red owl"),
        ("{% for s in shops %}{{ loop.index }} {{ s }}{% if not loop.last %}, {% endif %}{% endfor %}", "1 blue fox, 2 red owl"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("{{ query.upper() }} {{ query | truncate(5, true, '', 0) }} {{ query | length }}", "PIZZA NEAR ME pizza 13"),
        ("{{ query ~ '!' ~ 3 }}", "pizza near me!3"),
        ("{% set first = shops[0] %}{{ first.split(' ')[1] }}", "fox"),
        ("{{ shops | map('upper') | list | tojson }}", '["BLUE FOX", "RED OWL"]'),
        ("{% with n = 2 * 3 %}{{ n + 1 }}{% endwith %}", "7"),
        ("{{ '=' * 5 }}{% raw %}{{ x }}{% endraw %}{# said to nobody #}", "====={{ x }}"),
    ],
)
def test_what_a_prompt_may_do(rest: str, shown: str) -> None:
    assert render(USER.replace("REST", rest)) == f"{VALUES['query']}\n{shown}"


@pytest.mark.parametrize(
    "rest, said",
    [
        ("{{ 1/0 }}", "line 2: ZeroDivisionError"),
        ("\n{{ query + 1 }}", "line 3: TypeError"),
        ("{% if false %}\n\n{{ nope }}{% endif %}", "line 4: 'nope' is undefined; it may use query, shops"),
        ("{{ query.nope }}", "line 2: UndefinedError"),
        ("{{ query | nope }}", "line 2: no filter named nope"),
        ("{{ query", "line 2: "),
        ("{% if query %}", "line 2: "),
        ("{% include 'a.j2' %}", "line 2: include: a template cannot use other files"),
        ("{% import 'a.j2' as a %}", "line 2: import: a template cannot use other files"),
        ("{% from 'a.j2' import a %}", "line 2: fromimport: a template cannot use other files"),
        ("{% macro f() %}{% endmacro %}", "line 2: macro is not allowed in a prompt"),
        ("{% for s in shops recursive %}{{ loop(shops) }}{% endfor %}", "line 2: a recursive loop"),
        ("{% block more %}{% endblock %}", "line 2: block more would be dropped"),
        ("{{ shops | random }}", "line 2: no filter named random"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "line 2: 'cycler' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "line 2: SecurityError"),
        ("{{ shops['__class__'] }}", "line 2: SecurityError"),
        ("{{ query | attr('__class__') }}", "line 2: no filter named attr"),
        ("{{ shops | map(attribute='__class__') | first | string }}", "line 2: "),
        ("{{ shops.append('x') }}", "line 2: SecurityError"),
        ("{{ '{0.__class__}'.format(query) }}", "line 2: SecurityError"),
        ("{{ self.user() }}", "line 2: RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
    ],
)
def test_faults_are_named_with_their_line(rest: str, said: str) -> None:
    with pytest.raises(PromptError) as error:
        render(USER.replace("REST", rest))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("You help.\n{% block user %}{{ query }}{% endblock %}", "line 1: text outside of the blocks"),
        ("\n{# a note #}\n{% block user %}{{ query }}{% endblock %}\n\nThanks", "line 5: text outside"),
        ("{% set x = 1 %}{% block user %}{{ query }}{{ x }}{% endblock %}", "line 1: text outside"),
        ("{{ query }}", "line 1: text outside"),
        ("{% extends 'a.j2' %}{% block user %}{{ query }}{% endblock %}", "line 1: extends: a template cannot use other files"),
        ("{% block user %}{{ query }}{% endblock %}{% block user %}{% endblock %}", "line 1: block 'user' defined twice"),
        ("{% block system %}x{% endblock %}", "needs a block `user`"),
        ("", "needs a block `user`"),
    ],
)
def test_nothing_outside_of_the_blocks_is_dropped(text: str, said: str) -> None:
    with pytest.raises(PromptError) as error:
        render(text)
    assert said in str(error.value)


DOUBLED = "{% set a = a + a %}" * 60


@pytest.mark.parametrize(
    "rest",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [1] * 10000000000 }}",
        "{{ query * 9999999 }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ ('a' * 900000) | upper | length }}{% endfor %}",
        "{{ query.ljust(10000000000) }}",
        "{{ query.replace('', 'a' * 900000).replace('a', 'b' * 900000) }}",
        "{{ query | replace('e', 'a' * 900000) }}",
        "{{ '%9999999999d' % 3 }}",
        "{{ '{:9999999999}'.format(3) }}",
        "{{ '{:9999999999}'['for' ~ 'mat'](3) }}",
        f"{{% set a = 'aaaaaaaaaaaa' %}}{DOUBLED}",
        f"{{% set a = 9 %}}{DOUBLED.replace('+', '*')}",
        f"{{% set a = ['x'] %}}{DOUBLED}",
        "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60,
        "{% set a = 'xxxxxxxx' %}" + "{% set a = a ~ a %}" * 60,
        "{{ range(90000) | map('string') | map('replace', '1', 'a' * 100000) | join }}",
    ],
)
def test_what_computes_too_much_is_refused_soon(rest: str) -> None:
    started = time.monotonic()
    with pytest.raises(PromptError):
        render(USER.replace("REST", rest))
    assert time.monotonic() - started < limit(10)


def test_a_row_that_needs_too_much_fails_alone() -> None:
    prompt = Prompt("{% block user %}{% for c in query %}{{ c }}{% endfor %}{% endblock %}", ["query"])
    assert prompt.messages({"query": "pizza"}) == [{"role": "user", "content": "pizza"}]
    with pytest.raises(PromptError, match="line 1: the template computes too much"):
        prompt.messages({"query": "p" * 200_000})
    assert prompt.messages({"query": "thai"})[0]["content"] == "thai"  # what one row spent is not the next one's


def test_a_block_without_variables_is_rendered_once_and_others_each_time() -> None:
    template = "{% block system %}A{% if true %}B{% endif %}{% endblock %}{% block user %}{{ query }}{% endblock %}"
    once = Prompt(template, ["query"])
    assert once.constant == {"system": "AB"}
    assert [[m["content"] for m in once.messages({"query": q})] for q in "xy"] == [["AB", "x"], ["AB", "y"]]
    each = Prompt(template.replace("A{%", "{{ query }}{%"), ["query"])
    assert each.constant == {}
    assert [[m["content"] for m in each.messages({"query": q})] for q in "xy"] == [["xB", "x"], ["yB", "y"]]


@pytest.mark.parametrize(
    "data, said",
    [(b"{% block user %}\ncaf\xe9{% endblock %}", "line 2: byte 0xe9 is not UTF-8"), (None, "not found"), (b"", "cannot be read")],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "prompt.j2"
    if data:
        path.write_bytes(data)
    elif data is not None:
        path.mkdir()
    with pytest.raises(ConfigError, match=said) as error:
        read_template(path)
    assert error.value.where == str(path)
    assert error.value.fix


def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path: Path) -> None:
    plain, other = tmp_path / "a", tmp_path / "b"
    plain.write_bytes(b"{% block user %}\n{{ query }}\n{% endblock %}\n")
    other.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert read_template(plain) == read_template(other)
