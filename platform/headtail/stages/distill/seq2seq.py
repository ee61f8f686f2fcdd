"""Seq2seq students (T5 type): read the prompt as a whole, then learn to write the answer.

In: tasks, their I/O formats, training rows. Out: a Seq2SeqLearner for the training loop. A base made here is random: it learns the task
alone; for real use start from a hub model. Knows nothing of Ray, stores or engines' requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from headtail.core import io_format
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.engines.control import Encoder
from headtail.engines.transformers import prompt_ids, prompt_text
from headtail.stages.distill.base import Shape, load_base, silence_training
from headtail.stages.distill.batches import EXAMPLE, UNTAUGHT, Batch, Columns, check_lengths, training_answer

ROWS = pa.schema([("ids", pa.list_(pa.int32())), ("target", pa.list_(pa.int32())), *EXAMPLE])


@dataclass(frozen=True)
class Seq2SeqLearner:
    """An encoder-decoder."""

    io_format: io_format.ModelFormat
    kind: Any = "seq2seq"
    adapter_task: str = "SEQ_2_SEQ_LM"

    def make(self, shape: Shape, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
        """(random T5 of a shape, with as many layers to read as to write; its tokenizer)."""
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        from headtail.stages.distill.tokenizer import train_tokenizer

        silence_training()
        tokenizer = train_tokenizer(texts, shape.vocabulary)
        tokenizer.model_max_length = shape.positions
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            d_model=shape.hidden,
            d_ff=shape.feed_forward,
            d_kv=shape.hidden // shape.heads,
            num_layers=shape.layers,
            num_heads=shape.heads,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        return T5ForConditionalGeneration(config), tokenizer

    def load(self, path: str, revision: str = "", layers: int = 0) -> tuple[Any, Any]:
        if layers:
            raise ConfigError("a seq2seq base cannot be cut to some of its layers", where="base.layers", value=layers, fix="set it to 0")
        return load_base(path, revision, kind="seq2seq")

    def texts(self, task: Task, training_set: pa.Table) -> Iterable[str]:
        for row in training_set.to_pylist():
            yield from self._pair(task, row)

    def encode(self, task: Task, tokenizer: Any, training_set: pa.Table, max_tokens: int, held_out: set[bytes]) -> pa.Table:
        """ROWS for training rows; a row longer than `max_tokens` is an error that names it, never cut."""
        pairs = [self._pair(task, row) for row in training_set.to_pylist()]
        encoder, end = Encoder(tokenizer), int(tokenizer.eos_token_id)
        ids = prompt_ids(encoder, end, [prompt for prompt, _ in pairs])
        target = prompt_ids(encoder, end, [answer for _, answer in pairs])
        lengths = [len(a) + len(b) for a, b in zip(ids, target, strict=True)]
        check_lengths(training_set["query"].to_pylist(), lengths, max_tokens)
        held = [key in held_out for key in training_set["query_key"].to_pylist()]
        return pa.table([ids, target, lengths, training_set["weight"].to_pylist(), held], schema=ROWS)

    def _pair(self, task: Task, row: Mapping[str, Any]) -> tuple[str, str]:
        """What is read, and what is to be written."""
        answer = training_answer(task, row)
        side = {name: row.get(name) or [] for name in task.side_inputs}
        return prompt_text(self.io_format.messages(task, row["query"], side)), self.io_format.target(task, answer)

    def epoch_rows(self, rows: Columns, seed: int) -> Columns:
        return rows

    def collate(self, rows: Columns, chosen: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
        """A batch: what is read, and what is written, each padded to its longest."""
        ids, target = ([rows[name][int(i)] for i in chosen] for name in ("ids", "target"))
        shape = (len(ids), max(map(len, ids))), (len(ids), max(map(len, target)))
        arrays = {
            "ids": np.full(shape[0], pad, np.int64),
            "mask": np.zeros(shape[0], np.int64),
            "labels": np.full(shape[1], UNTAUGHT, np.int64),
        }
        for i, (read, written) in enumerate(zip(ids, target, strict=True)):
            arrays["ids"][i, : len(read)] = read
            arrays["mask"][i, : len(read)] = 1
            arrays["labels"][i, : len(written)] = written
        arrays["weight"] = weights.astype(np.float32)
        real = int(arrays["mask"].sum() + (arrays["labels"] != UNTAUGHT).sum())
        return Batch(arrays, real, arrays["mask"].size + arrays["labels"].size)

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        from torch.nn import functional

        logits, wanted = self.outputs(engine, arrays), arrays["labels"]
        chosen = wanted != UNTAUGHT
        each = functional.cross_entropy(logits[chosen].float(), wanted[chosen], reduction="none")
        weight = arrays["weight"][:, None].expand_as(wanted)[chosen]
        return (each * weight).sum(), weight.sum()

    def outputs(self, module: Any, arrays: Mapping[str, Any]) -> Any:
        config = getattr(module, "module", module).config
        before = arrays["labels"].roll(1, 1)
        before[:, 0] = config.decoder_start_token_id
        before[before == UNTAUGHT] = config.pad_token_id
        asked = {"input_ids": arrays["ids"], "attention_mask": arrays["mask"], "decoder_input_ids": before}
        return module(**asked, use_cache=False).logits

    def finish(self, folder: Path) -> None:
        io_format.write_format(self.io_format, folder)
