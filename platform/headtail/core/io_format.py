"""A student's form: how it is asked and in what it answers. Kept as headtail.json beside its weights.

In: a task, a query and side inputs; later the text that the student wrote. Out: messages to ask with, the text it is taught
to write, what an engine binds it to, and the answer read back. A model without headtail.json has the default form: the
task's own prompt, answered in JSON. A form other than that belongs to one task; another is an error. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from headtail.core import record
from headtail.core.compact import ALPHABET, VERSION, Codec, Unfit
from headtail.core.config import Config, build
from headtail.core.errors import ConfigError
from headtail.core.keys import fingerprint
from headtail.core.task import Task

FILE = "headtail.json"
# Of a student that sees the bare query: nothing but what is asked, and a line's end after which it answers.
BARE_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"

Kind = Literal["decoder", "encoder", "seq2seq"]


class Manner(Config):
    """How a student is to be asked and to answer: what a person chooses."""

    prompt: Literal["task", "bare"] = Field("task", description="task: the task's own prompt; bare: the query alone")
    side: bool = Field(False, description="bare: whether side inputs follow the query, a line each")
    system_role: Literal["keep", "merge"] = Field(
        "keep",
        description="merge: the system message stands before the first user message, where a base knows no system role (Gemma, Mistral)",
    )
    answer: Literal["json", "code"] = Field("json", description="json: as the schema has it; code: a compact code of it (docs/students.md)")


class Look(NamedTuple):
    """What a student's text says. `spans`: where a code's decisions are; None for JSON, in which they are its scalar values."""

    answer: Any
    problem: str
    spans: list[tuple[int, int]] | None


class Form(Manner):
    """A Manner with what it was made for. The default is how any model is asked."""

    kind: Kind = Field("decoder", description="decoder: reads and writes on; encoder: labels what it reads; seq2seq: reads, then writes")
    task: str = Field("", description="name of the task; empty for the default form, which suits any")
    schema_digest: str = Field("", description="fingerprint of the task's answer schema")
    code: int = Field(0, ge=0, description="version of the code that answers are in; 0 for none")

    @property
    def default(self) -> bool:
        return (self.kind, self.prompt, self.answer, self.system_role) == ("decoder", "task", "json", "keep")

    @property
    def settings(self) -> dict[str, Any]:
        """What of it changes an answer: part of every answer_key, and nothing for the default form."""
        return {} if self.default else {"form": self.model_dump(exclude={"task", "schema_digest"})}

    @property
    def chat_template(self) -> str | None:
        """The template that a student's tokenizer is to have; None keeps the base's own."""
        return BARE_TEMPLATE if self.prompt == "bare" else None

    def signs(self, tokenizer: Any) -> list[int]:
        """Ids of the code's signs that are tokens: a base may never have met them, and then its embeddings of them are all alike."""
        known = tokenizer.get_vocab() if self.answer != "json" else {}
        return sorted(known[sign] for sign in ALPHABET if sign in known)

    def check(self, task: Task) -> Form:
        """Itself, when it was made for `task` and this version reads its code; else ConfigError."""
        if self.default:
            return self
        if (self.task, self.schema_digest) != (task.name, fingerprint(task.schema)):
            same = "the same task with another answer schema" if self.task == task.name else f"the task {task.name}"
            fix = f"use it for {self.task} with the schema it was distilled with, or distil a student for this one"
            raise ConfigError(f"this student was made for {self.task}, not for {same}", where=f"{FILE} of the model", fix=fix)
        if self.answer != "json":
            if self.code != VERSION:
                fix = "distil it again, or use the version of headtail that made it"
                what = f"this student answers in version {self.code} of the code; this headtail reads version {VERSION}"
                raise ConfigError(what, where=f"{FILE} of the model", fix=fix)
            codec(task)
        return self

    # --- asking

    def messages(self, task: Task, query: str, side: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, str]]:
        """The chat messages for one query; they go into its answer_key."""
        if self.prompt == "task":
            found = task.messages(query, side)
            return merged(found) if self.system_role == "merge" else found
        lines = [query]
        if self.side:
            lines += ["; ".join((side or {}).get(name) or ()) for name in task.side_inputs]
        return [{"role": "user", "content": "\n".join(lines).rstrip("\n")}]

    def bound(self, task: Task, max_tokens: int) -> dict[str, Any] | str | None:
        """What an engine binds answers to: a JSON Schema, a grammar in EBNF, or None when the engine makes them otherwise."""
        if self.kind == "encoder":
            return None
        return task.schema if self.answer == "json" else codec(task).grammar(max_tokens)

    # --- answering

    def target(self, task: Task, answer: Any) -> str:
        """The text that a student is taught to write."""
        return task.target(answer) if self.answer == "json" else codec(task).encode(answer)

    def look(self, task: Task, text: str) -> Look:
        """What `text` says: an answer valid under the schema, or why there is none."""
        if self.answer == "json":
            return Look(*task.parse(text), None)
        try:
            found = codec(task).decode(text)
        except Unfit as error:
            return Look(None, f"not a code: {error}", [])
        return Look(*task.parse(task.dump(found.answer)), found.spans)

    def as_json(self, task: Task, text: str, found: Look) -> str:
        """`text`, in which `found` was seen, as the task's JSON; what stands for no answer is no JSON either."""
        if self.answer == "json":
            return text
        return "" if found.problem else task.dump(found.answer)


DEFAULT = Form()
_CODECS: dict[tuple[str, str], Codec] = {}


def codec(task: Task) -> Codec:
    """The code of a task's answers; ConfigError when they have none. Made once per process."""
    key = (task.name, task.fingerprint)
    if key not in _CODECS:
        _CODECS[key] = Codec(task.schema, str(task.folder / "task.yaml"))
    return _CODECS[key]


def merged(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """`messages` without a system role: its text stands before the first user message, a blank line between them."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if system and rest and rest[0]["role"] == "user":
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    elif system:
        rest.insert(0, {"role": "user", "content": system})
    return rest


def made_for(task: Task, manner: Manner, kind: Kind = "decoder") -> Form:
    """The form of a student of `kind` for `task`; the default one when nothing in it differs. ConfigError when it cannot be."""
    if kind == "encoder" and manner.answer != "json":
        raise ConfigError("an encoder writes nothing that could be code", where="form.answer", value=manner.answer, fix="leave it at json")
    form = Form(
        **manner.model_dump(),
        kind=kind,
        task=task.name,
        schema_digest=fingerprint(task.schema),
        code=VERSION if manner.answer != "json" else 0,
    )
    return DEFAULT if form.default else form.check(task)


def write(form: Form, folder: Path) -> None:
    """Put a form beside a model's weights, before their digest is taken. The default form is no file."""
    if not form.default:
        (folder / FILE).write_text(form.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Form:
    """The form of the model in `folder`."""
    file = folder / FILE
    return parse(file.read_bytes(), str(file)) if file.is_file() else DEFAULT


def parse(data: bytes, where: str) -> Form:
    """The Form in a headtail.json. ConfigError when it is none, or has fields that this version does not know."""
    return build(Form, record.parse(data, where, ConfigError, "distil the student again"), where)
