"""A student's I/O format: how it is prompted and what it writes. Kept as headtail.json beside its weights.

In: a task, a query and side inputs; later the text that the student wrote. Out: messages to ask with, the text it is taught
to write, what an engine binds it to, and the answer read back. A model without headtail.json has the default I/O format: the
task's own prompt, answered in JSON. An I/O format other than that belongs to one task; another is an error. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from headtail.core import record
from headtail.core.compact import ALPHABET, VERSION, Codec, CompactError
from headtail.core.config import Config, build_config
from headtail.core.errors import ConfigError
from headtail.core.keys import fingerprint
from headtail.core.task import Task

FILE = "headtail.json"
# Of a student that sees the query alone, and a line's end after which it answers.
QUERY_ONLY_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"

Kind = Literal["decoder", "encoder", "seq2seq"]


class IOFormat(Config):
    """How a student is to be asked and to answer: what a person chooses."""

    prompt: Literal["full", "query_only"] = Field("full", description="full: the task's own prompt; query_only: the query alone")
    side_inputs: bool = Field(False, description="query_only: whether side inputs follow the query, one line each")
    system_role: Literal["keep", "merge"] = Field(
        "keep",
        description="merge: put the system message before the first user message, for bases without a system role (Gemma, Mistral)",
    )
    output: Literal["json", "compact"] = Field(
        "json", description="json: JSON under the schema; compact: a shorter text for the same answer (docs/students.md)"
    )


class ParsedText(NamedTuple):
    """What a student's text says. `spans`: where a compact text's decisions are; None for JSON: its scalar values."""

    answer: Any
    problem: str
    spans: list[tuple[int, int]] | None


class ModelFormat(IOFormat):
    """An IOFormat with the task that it was made for. The default is how any model is asked."""

    kind: Kind = Field("decoder", description="decoder: reads and writes on; encoder: labels what it reads; seq2seq: reads, then writes")
    task: str = Field("", description="name of the task; empty for the default I/O format, which suits any")
    schema_digest: str = Field("", description="fingerprint of the task's answer schema")
    compact_version: int = Field(0, ge=0, description="version of the compact format that answers are in; 0 for none")

    @property
    def default(self) -> bool:
        return (self.kind, self.prompt, self.output, self.system_role) == ("decoder", "full", "json", "keep")

    @property
    def settings(self) -> dict[str, Any]:
        """What of it changes an answer: part of every answer_key, and nothing for the default I/O format."""
        return {} if self.default else {"io_format": self.model_dump(exclude={"task", "schema_digest"})}

    @property
    def chat_template(self) -> str | None:
        """The template that a student's tokenizer is to have; None keeps the base's own."""
        return QUERY_ONLY_TEMPLATE if self.prompt == "query_only" else None

    def symbols(self, tokenizer: Any) -> list[int]:
        """Ids of the compact format's symbols that are tokens: in a base that never saw them their embeddings are all equal."""
        known = tokenizer.get_vocab() if self.output != "json" else {}
        return sorted(known[symbol] for symbol in ALPHABET if symbol in known)

    def check(self, task: Task) -> ModelFormat:
        """Itself, when it was made for `task` and this version reads its output; else ConfigError."""
        if self.default:
            return self
        if (self.task, self.schema_digest) != (task.name, fingerprint(task.schema)):
            same = "the same task with another answer schema" if self.task == task.name else f"the task {task.name}"
            fix = f"use it for {self.task} with the schema it was distilled with, or distil a student for this one"
            raise ConfigError(f"this student was made for {self.task}, not for {same}", where=f"{FILE} of the model", fix=fix)
        if self.output != "json":
            if self.compact_version != VERSION:
                fix = "distil it again, or use the version of headtail that made it"
                what = (
                    f"this student answers in version {self.compact_version} of the compact format; this headtail reads version {VERSION}"
                )
                raise ConfigError(what, where=f"{FILE} of the model", fix=fix)
            codec(task)
        return self

    # --- asking

    def messages(self, task: Task, query: str, side: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, str]]:
        """The chat messages for one query; they go into its answer_key."""
        if self.prompt == "full":
            found = task.messages(query, side)
            return merge_system_message(found) if self.system_role == "merge" else found
        lines = [query]
        if self.side_inputs:
            lines += ["; ".join((side or {}).get(name) or ()) for name in task.side_inputs]
        return [{"role": "user", "content": "\n".join(lines).rstrip("\n")}]

    def bound(self, task: Task, max_tokens: int) -> dict[str, Any] | str | None:
        """What an engine binds answers to: a JSON Schema, a grammar in EBNF, or None when the engine makes them otherwise."""
        if self.kind == "encoder":
            return None
        return task.schema if self.output == "json" else codec(task).grammar(max_tokens)

    # --- answering

    def target(self, task: Task, answer: Any) -> str:
        """The text that a student is taught to write."""
        return task.target(answer) if self.output == "json" else codec(task).encode(answer)

    def parse_text(self, task: Task, text: str) -> ParsedText:
        """What `text` says: an answer valid under the schema, or why there is none."""
        if self.output == "json":
            return ParsedText(*task.parse(text), None)
        try:
            found = codec(task).decode(text)
        except CompactError as error:
            return ParsedText(None, f"not in the compact format: {error}", [])
        return ParsedText(*task.parse(task.dump(found.answer)), found.spans)

    def as_json(self, task: Task, text: str, parsed: ParsedText) -> str:
        """`text`, of which `parsed` was made, as the task's JSON; what stands for no answer is no JSON either."""
        if self.output == "json":
            return text
        return "" if parsed.problem else task.dump(parsed.answer)


DEFAULT = ModelFormat()
_CODECS: dict[tuple[str, str], Codec] = {}


def codec(task: Task) -> Codec:
    """The compact format of a task's answers; ConfigError when they have none. Made once per process."""
    key = (task.name, task.fingerprint)
    if key not in _CODECS:
        _CODECS[key] = Codec(task.schema, str(task.folder / "task.yaml"))
    return _CODECS[key]


def merge_system_message(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """`messages` without a system role: its text stands before the first user message, a blank line between them."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if system and rest and rest[0]["role"] == "user":
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    elif system:
        rest.insert(0, {"role": "user", "content": system})
    return rest


def format_for(task: Task, io_format: IOFormat, kind: Kind = "decoder") -> ModelFormat:
    """The I/O format of a student of `kind` for `task`; the default one when nothing in it differs. ConfigError when it cannot be."""
    if kind == "encoder" and io_format.output != "json":
        raise ConfigError(
            "an encoder writes no text that could be compact", where="io_format.output", value=io_format.output, fix="leave it at json"
        )
    fmt = ModelFormat(
        **io_format.model_dump(),
        kind=kind,
        task=task.name,
        schema_digest=fingerprint(task.schema),
        compact_version=VERSION if io_format.output != "json" else 0,
    )
    return DEFAULT if fmt.default else fmt.check(task)


def write_format(fmt: ModelFormat, folder: Path) -> None:
    """Put an I/O format beside a model's weights, before their digest is taken. The default I/O format is no file."""
    if not fmt.default:
        (folder / FILE).write_text(fmt.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_format(folder: Path) -> ModelFormat:
    """The I/O format of the model in `folder`."""
    file = folder / FILE
    return parse_format(file.read_bytes(), str(file)) if file.is_file() else DEFAULT


def parse_format(data: bytes, where: str) -> ModelFormat:
    """The ModelFormat in a headtail.json. ConfigError when it is none, or has fields that this version does not know."""
    return build_config(ModelFormat, record.parse_object(data, where, ConfigError, "distil the student again"), where)
