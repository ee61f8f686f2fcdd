"""Configs: what is unknown or out of range is said by name, with the value and the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from headtail.core.config import Config, StageConfig, apply_sets, execution, load_config, read_yaml, result_fields
from headtail.core.errors import ConfigError


class Inner(Config):
    rows: int = Field(3, ge=1, description="rows")
    workers: int = execution(1, "workers")


class Outer(StageConfig):
    name: str = Field("x", description="name")
    head: Inner = Field(Inner(), description="head")
    maybe: Inner | None = Field(None, description="optional group")
    names: tuple[str, ...] = Field(("",), description="names")
    deep: Outer | None = Field(None, description="a group with a text")


def test_file_then_sets_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: from-file\nhead: {rows: 5}\n")
    found = load_config(Outer, file, ["head.rows=7", "maybe.rows=2", "name=a=b"])
    assert (found.name, found.head.rows, found.maybe and found.maybe.rows) == ("a=b", 7, 2)


@pytest.mark.parametrize("text", ["0042", "42", "1e3", "2026-11-01", "yes", "0x1f", "1_000", "0.50", "2031-13-45"])
def test_a_text_stays_as_it_was_typed(tmp_path: Path, text: str) -> None:
    assert load_config(Outer, None, [f"name={text}", "maybe.rows=2"]).name == text
    assert load_config(Outer, None, [f"names=[{text}]"]).names == (text,)
    file = tmp_path / "c.yaml"
    for fields in (f"name: {text}\nhead: {{rows: 5}}", f"deep: {{name: {text}}}\n", f"names: [a, {text}]"):
        file.write_text(fields)
        found = load_config(Outer, file, ["maybe.rows=2"])
        assert text in (found.name, found.names[-1], found.deep and found.deep.name), fields


@pytest.mark.parametrize(
    "sets, said",
    [
        (["head.row=3"], "unknown field head.row .*did you mean rows"),
        (["nme=3"], "unknown field nme .*did you mean name"),
        (["maybe.rowz=3"], "did you mean rows"),
        (["head.rows=0"], "field head.rows: .*greater than or equal to 1.*value 0"),
        (["head.rows=many"], "field head.rows: .*integer.*'many'"),
        (["name.deep=3", "name.x=1"], "field name"),
        (["name=null"], "field name"),
        (["name=[a]"], "field name"),
        (["no-equals"], "path.to.field=value"),
        (["=3"], "path.to.field=value"),
    ],
)
def test_bad_values_are_named(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(Outer, None, sets)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "text, sets, where",
    [
        ("name: a", ["head.rows=-1", "name=b"], "--set head.rows=-1"),
        ("nam: a", ["name=b"], "FILE"),
        ("nam: a", ["head={rows: -1}", "maybe.rows=x"], "--set head={rows: -1}, --set maybe.rows=x, FILE"),
        ("name: [a]", [], "FILE"),
    ],
)
def test_a_wrong_value_of_a_set_is_not_blamed_on_the_file(tmp_path: Path, text: str, sets: list[str], where: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(Outer, file, [*sets, "root=here"])
    assert sorted(str(refused.value.where).replace(str(file), "FILE").split(", ")) == sorted(where.split(", "))


def test_set_into_a_single_value_is_said() -> None:
    with pytest.raises(ConfigError, match="single value"):
        apply_sets({"a": 1}, ["a.b=2"])


BOMB = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" if i else "a0: &a0 [x]" for i in range(9)])


@pytest.mark.parametrize(
    "content, said",
    [
        (b"[1, 2]", "mapping"),
        (b"a: [", "not valid YAML: line 1: "),
        (b"\xff\xfe\x00", "cannot be read|not valid YAML"),
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: the field c occurs twice"),
        (BOMB.encode(), "more than 100,000 values, aliases followed"),
        (b"a: !!python/object:os.system x", "not valid YAML: line 1: could not determine a constructor"),
        (b"a: &a [*a]", "more than 100,000 values, aliases followed"),
        (b"a: 0b_", "not valid YAML: invalid literal"),
        (b'a: !!int "x"', "not valid YAML: invalid literal"),
        (b'a: !!bool "x"', "not valid YAML: 'x'"),
        (b'a: !!int ""', "not valid YAML"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_files(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_yaml(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        read_yaml(tmp_path / "none.yaml")


def test_execution_fields_stay_out_of_fingerprints() -> None:
    fields = result_fields(Outer(root="elsewhere", head=Inner(workers=9)))
    assert fields == {"name": "x", "head": {"rows": 3}, "maybe": None, "names": [""], "deep": None}


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Outer().name = "y"  # type: ignore[misc]


def test_bare_null_in_yaml_is_the_null_engine() -> None:
    from headtail.engines import ModelConfig

    assert load_config(ModelConfig, None, ["engine=null"]).engine == "null"


def test_naming_one_field_of_a_group_keeps_the_groups_own_defaults() -> None:
    class Whole(Config):
        inner: Inner = Field(Inner(rows=9, workers=4), description="a group whose defaults are not its type's")
        deep: Outer = Field(Outer(name="n", head=Inner(rows=8)), description="a group in a group")

    found = load_config(Whole, None, ["inner.workers=2", "deep.head.workers=3"])
    assert (found.inner.rows, found.inner.workers) == (9, 2)
    assert (found.deep.name, found.deep.head.rows, found.deep.head.workers) == ("n", 8, 3)
    with pytest.raises(ConfigError, match=r"unknown field deep\.head\.row .*did you mean rows"):
        load_config(Whole, None, ["deep.head.row=2"])


def test_a_trained_teacher_keeps_its_settings_when_one_is_changed() -> None:
    from headtail.pipeline import Config as Pipeline

    plain, changed = Pipeline().train_teacher, load_config(Pipeline, None, ["train_teacher.epochs=2"]).train_teacher
    assert changed == plain.model_copy(update={"epochs": 2.0})
