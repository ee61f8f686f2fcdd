"""The differences between kinds of student: examples, loss, and the files of a model folder.

In: a kind, and what it should learn. Out: a Learner, by which the driver (`distill`) makes examples and the training loop
(`train`) makes batches and losses. One small picklable value without weights: the driver makes it, every worker gets a copy.
Knows nothing of Ray, DeepSpeed, checkpoints or stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from headtail.core.errors import ConfigError
from headtail.core.io_format import DEFAULT, IOFormat, ModelFormat, format_for
from headtail.core.io_format import write_format as write_io_format
from headtail.core.rows import TOP
from headtail.core.task import Task
from headtail.stages.distill.base import Shape
from headtail.stages.distill.batches import UNTAUGHT, Batch, Columns
from headtail.stages.distill.logits import COLUMNS, add_stored_logits, answer_scores, soft_loss

Kind = Literal["decoder", "encoder", "seq2seq"]


class Learner(Protocol):
    """One kind of student. `encode` fixes the columns of an example; `collate` and `loss` alone read them.

    Every table of examples has at least batches.EXAMPLE: `length` (tokens that a step pays for), `weight`, `held_out`.
    """

    @property
    def kind(self) -> Kind: ...

    @property
    def io_format(self) -> ModelFormat: ...

    @property
    def adapter_task(self) -> str:
        """PEFT's name for this kind of model: CAUSAL_LM, SEQ_2_SEQ_LM, TOKEN_CLS ..."""
        ...

    def make(self, shape: Shape, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
        """(random fp32 model of a shape, its tokenizer learnt from `texts`: all that a student reads and writes)."""
        ...

    def load(self, path: str, revision: str = "", layers: int = 0) -> tuple[Any, Any]:
        """(model in fp32 on the CPU, tokenizer) from a folder or hub id, cut to `layers` of its layers when asked."""
        ...

    def texts(self, task: Task, training_set: pa.Table) -> Iterable[str]:
        """All that a student reads and writes for these rows."""
        ...

    def encode(self, task: Task, tokenizer: Any, training_set: pa.Table, max_tokens: int, held_out: set[bytes]) -> pa.Table:
        """Examples in the order of `training_set`, one per row; TrainingError names a row that is too long or not valid."""
        ...

    def epoch_rows(self, rows: Columns, seed: int) -> Columns:
        """The examples as the epoch of `seed` shows them, by that seed alone; `length` is what each then has. Most kinds never vary."""
        ...

    def collate(self, rows: Columns, chosen: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
        """The examples numbered `chosen` as one padded batch; `weights` (same length) are theirs, 0 for a filler."""
        ...

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """(weighted sum of losses over what is to be learnt, sum of those weights): two scalar tensors, the first with a gradient.

        `engine` is called like the model; `arrays` are Batch.arrays as tensors on its device. No example may see another.
        """
        ...

    def outputs(self, module: Any, arrays: Mapping[str, Any]) -> Any:
        """The model's logits for a batch: what merged weights are compared by. A decoder's are those at the tokens of its answers."""
        ...

    def finish(self, folder: Path) -> None:
        """Write what belongs beside the weights and is the kind's own (headtail.json, labels)."""
        ...


@dataclass(frozen=True)
class DecoderLearner:
    """A causal language model that reads the prompt and learns to write the answer."""

    kind: Kind = "decoder"
    adapter_task: str = "CAUSAL_LM"
    io_format: ModelFormat = DEFAULT  # how the student is asked and answers
    soft: float = 0.0  # share of the loss that comes from a teacher's logits (see logits.py)
    stored: int = 0  # how many of the likeliest tokens come with the training rows; 0: a teacher is asked

    def make(self, shape: Shape, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
        from headtail.stages.distill.base import make_decoder_base
        from headtail.stages.distill.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(texts, shape.vocabulary)
        tokenizer.model_max_length = shape.positions
        return make_decoder_base(shape, tokenizer, seed), self._prompt_ids(tokenizer)

    def load(self, path: str, revision: str = "", layers: int = 0) -> tuple[Any, Any]:
        from headtail.stages.distill.base import load_base

        model, tokenizer = load_base(path, revision, layers)
        return model, self._prompt_ids(tokenizer)

    def _prompt_ids(self, tokenizer: Any) -> Any:
        if self.io_format.chat_template is not None:
            begin = "{{ bos_token }}" if begins_texts(tokenizer) else ""
            tokenizer.chat_template = begin + self.io_format.chat_template
        return tokenizer

    def texts(self, task: Task, training_set: pa.Table) -> Iterable[str]:
        for row in training_set.to_pylist():
            side = {name: row[name] for name in task.side_inputs}
            yield from (message["content"] for message in self.io_format.messages(task, row["query"], side))
            yield self.io_format.target(task, task.parse(row["answer"])[0])

    def encode(self, task: Task, tokenizer: Any, training_set: pa.Table, max_tokens: int, held_out: set[bytes]) -> pa.Table:
        from headtail.stages.distill.batches import encode_examples

        if not self.stored:
            return encode_examples(task, tokenizer, training_set, max_tokens, held_out, self.io_format)
        return add_stored_logits(
            encode_examples(task, tokenizer, training_set.drop_columns(TOP.names), max_tokens, held_out, self.io_format),
            training_set,
            self.stored,
        )

    def epoch_rows(self, rows: Columns, seed: int) -> Columns:
        return rows

    def collate(self, rows: Columns, chosen: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
        from headtail.stages.distill.batches import collate

        batch = collate([rows["ids"][i] for i in chosen], rows["answer_start"][chosen], weights, pad)
        if self.soft and COLUMNS[0] in rows:  # one row per answer token, in the order in which `loss` gathers them; probes have none
            counts = [len(rows["ids"][i]) - rows["answer_start"][i] for i in chosen]
            for name in COLUMNS:
                flat = [rows[name][i].reshape(count, -1) for i, count in zip(chosen, counts, strict=True)]
                batch.arrays[name] = np.concatenate(flat).astype(np.int64 if name == COLUMNS[0] else np.float32)
        return batch

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        from torch.nn import functional

        wanted = arrays["labels"][:, 1:]
        chosen, scores = wanted != UNTAUGHT, answer_scores(engine, arrays)
        each = functional.cross_entropy(scores, wanted[chosen], reduction="none")
        if self.soft and engine.training:  # judged by the answers alone, so that runs with and without logits compare
            each = (1 - self.soft) * each + self.soft * soft_loss(scores, *(arrays[name] for name in COLUMNS))
        weight = arrays["weight"][:, None].expand_as(wanted)[chosen]
        return (each * weight).sum(), weight.sum()

    def outputs(self, module: Any, arrays: Mapping[str, Any]) -> Any:
        return answer_scores(module, arrays)

    def finish(self, folder: Path) -> None:
        """The I/O format, as headtail.json; the default one is no file."""
        write_io_format(self.io_format, folder)


def begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with a token of its own, as Gemma's, Llama's and Mistral's do."""
    first = tokenizer.bos_token_id
    return first is not None and tokenizer("x")["input_ids"][:1] == [first]


def learner_for(
    kind: Kind,
    tasks: Sequence[Task],
    training_set: Sequence[pa.Table],
    io_format: IOFormat | None = None,
    soft: float = 0.0,
    **settings: Any,
) -> Learner:
    """The learner of a kind for these tasks; ConfigError when their answers do not suit it.

    `io_format`: how the student is asked and answers; `soft`: share of the loss that is the teacher's logits'; `settings`: of the kind.
    """
    io_format = io_format or IOFormat()
    if kind == "encoder":
        from headtail.stages.distill.encoder import encoder_learner

        return encoder_learner(tasks, training_set, io_format, settings["encoder"], settings.get("queries", ()))
    formats = {task.fingerprint: format_for(task, io_format, kind) for task in tasks}
    if len(formats) > 1 and any(not fmt.default for fmt in formats.values()):
        raise ConfigError(
            "a student of several tasks needs the whole prompt, which shows the task",
            where="io_format",
            value=io_format.prompt,
            fix="prompt: full, output: json",
        )
    if kind == "decoder":
        return DecoderLearner(io_format=next(iter(formats.values())), soft=soft, stored=settings.get("stored", 0))
    from headtail.stages.distill.seq2seq import Seq2SeqLearner

    return Seq2SeqLearner(next(iter(formats.values())))
