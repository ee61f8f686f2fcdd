"""Encoder students: a BERT-type model learns to label the words of a query, and so to answer without writing.

In: a task whose answers labels can express, training rows, perhaps further queries without answers. Out: an EncoderLearner for the
training loop: examples are a query's ids with the labels of its answer; besides the query they hold copies of it with
a typing error, so that spelling is learnt from more errors than the log has. A base made here is first trained to guess
hidden words of queries (masked LM, Devlin et al. 2019). Knows nothing of Ray, stores or engines' requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.core import io_format, tagging
from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.core.receipt import Receipt
from headtail.core.task import Task
from headtail.engines.decisions import head_slices
from headtail.engines.encoder import LABELS, load_encoder, pad_reads
from headtail.engines.words import WordTokenizer, split_prompt
from headtail.stages.distill.base import Shape, keep_layers, silence_training
from headtail.stages.distill.batches import EXAMPLE, UNTAUGHT, Batch, Columns, check_lengths, training_answer

NOISED = 4  # copies of a training row with typing errors; an epoch shows one or none
LEAST_EXACT = 0.5  # share of training answers below which an encoder is the wrong student
SLIP_LETTERS = 5  # of words that are misspelt where no list says which are known
_LIST = pa.list_(pa.int32())
# `ids`, `places`, `fixes`: the variants of a row one after another, the row as it is first; `sizes`, `firsts`: tokens of each variant.
COLUMNS = pa.schema(
    [(name, _LIST) for name in ("ids", "sizes", "firsts", "places", "fixes", "kinds", "labels", "values")] + [pa.field("exact", pa.bool_())]
)
ROWS = pa.schema([*COLUMNS, *EXAMPLE])


class Settings(Config):
    """What is the encoder's own."""

    corrections: int = Field(2048, ge=0, description="how many of the most frequent spellings may replace a word; 0: texts stay as typed")
    misspelt_share: float = Field(0.4, ge=0, lt=1, description="share of training rows that an epoch shows with one word misspelt")
    inexact: Literal["skip", "nearest"] = Field(
        "skip", description="rows whose answer labels cannot express exactly. skip: weight 0; nearest: learn the nearest labels"
    )
    queries: tuple[str, ...] = Field((), description="table refs of queries without answers that base.shape learns from too")
    pretrain_epochs: float = Field(8.0, ge=0, description="passes of base.shape over queries with hidden words; 0: none")
    pretrain_rate: float = Field(2e-3, gt=0, description="peak learning rate of the pretraining")
    pretrain_rows: int = Field(200_000, ge=0, description="maximum of queries in the pretraining")


@dataclass(frozen=True)
class EncoderLearner:
    """A token classifier: see tagging.Scheme and engines.decisions.head_slices for what its outputs stand for."""

    scheme: tagging.Scheme
    io_format: io_format.ModelFormat
    settings: Settings
    queries: tuple[str, ...] = field(default=(), repr=False, compare=False)  # for `texts` alone: workers do without
    kind: Any = "encoder"
    adapter_task: str = "TOKEN_CLS"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "queries": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # --- the model

    @property
    def base_description(self) -> str:
        """What `make` makes, for receipts."""
        return "random weights" + (", taught hidden words of queries" if self.settings.pretrain_epochs else "")

    def make(self, shape: Shape, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
        """A BERT of a shape that has learnt to guess hidden words of `texts`, with heads of random weights."""
        from headtail.stages.distill.masked import make_encoder_base

        return make_encoder_base(shape, list(dict.fromkeys(texts)), seed, self.settings, self.scheme)

    def load(self, path: str, revision: str = "", layers: int = 0) -> tuple[Any, Any]:
        silence_training()
        model, tokenizer = load_encoder(path, self.scheme, revision=revision)
        if layers and layers < model.config.num_hidden_layers:
            keep_layers(model, layers)
        return model, tokenizer

    def texts(self, task: Task, training_set: pa.Table) -> Iterable[str]:
        """Queries and what stands beside them, known spellings, queries without answers."""
        for row in training_set.to_pylist():
            yield from (text for text in self._query_and_side(task, row) if text)
        yield " ".join(self.scheme.corrections)
        yield from self.queries

    # --- examples

    def encode(self, task: Task, tokenizer: Any, training_set: pa.Table, max_tokens: int, held_out: set[bytes]) -> pa.Table:
        """ROWS for training rows; a row longer than `max_tokens` is an error that names it, never cut."""
        reader, numbers = WordTokenizer(tokenizer), tagging.fix_numbers(self.scheme)
        made = []
        for row in training_set.to_pylist():
            out = row["query_key"] in held_out
            example = self._example(task, reader, numbers, row, 0 if out or not self.settings.misspelt_share else NOISED)
            check_lengths([row["query"]], [example["length"]], max_tokens)
            counts = example["exact"] or self.settings.inexact == "nearest"
            made.append({**example, "weight": row["weight"] if counts else 0.0, "held_out": out})
        self._tell(made)
        return pa.Table.from_pylist(made, schema=ROWS)

    def _tell(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Say how much of the training set labels can hold; ConfigError when it is little."""
        share = sum(one["exact"] for one in examples) / max(1, len(examples))
        say(
            f"labels       hold {share:.1%} of {len(examples):,} training answers exactly, "
            f"with {len(self.scheme.corrections):,} corrections"
        )
        if share < LEAST_EXACT:
            fix = "use student: decoder or seq2seq; or change the answers: texts must be pieces of the query, in its order"
            raise ConfigError("labels cannot hold most of the training answers", where="student", value=f"{share:.1%} exactly", fix=fix)

    def _query_and_side(self, task: Task, row: Mapping[str, Any]) -> tuple[str, str]:
        messages = self.io_format.messages(task, row["query"], {name: row.get(name) or [] for name in task.side_inputs})
        return split_prompt(messages[-1]["content"])

    def _labels(self, task: Task, row: Mapping[str, Any], numbers: Mapping[str, int]) -> tagging.Tags:
        return tagging.encode_tags(self.scheme, row["query"], training_answer(task, row), numbers)

    def _example(
        self, task: Task, reader: WordTokenizer, numbers: Mapping[str, int], row: Mapping[str, Any], copies: int
    ) -> dict[str, Any]:
        query, beside = self._query_and_side(task, row)
        tags = self._labels(task, row, numbers)
        variants = [(query, list(tags.fixes))]
        variants += misspelt_variants(query, tags, self.scheme, numbers, copies, random.Random(row["query_key"])) if copies else []
        reads = [reader.read(text, beside) for text, _ in variants]
        reads_fixes = [(found, fixes) for found, (_, fixes) in zip(reads, variants, strict=True) if len(found.places) == len(tags.kinds)]
        return {
            "ids": [i for found, _ in reads_fixes for i in found.ids],
            "sizes": [len(found.ids) for found, _ in reads_fixes],
            "firsts": [found.first for found, _ in reads_fixes],
            "places": [i for found, _ in reads_fixes for i in found.places],
            "fixes": [i for _, fixes in reads_fixes for i in fixes],
            "kinds": list(tags.kinds),
            "labels": [i if i != tagging.NONE else UNTAUGHT for i in tags.labels],
            "values": [i if i != tagging.NONE else UNTAUGHT for i in tags.values],
            "exact": tags.exact,
            "length": max(len(found.ids) for found, _ in reads_fixes),
        }

    def epoch_rows(self, rows: Columns, seed: int) -> Columns:
        """`rows` with `variant`, which of a row's variants this epoch shows, and the `length` of that one.

        Drawn before batches are planned: an error makes a row longer, and planned by the longest variant, a quarter of a batch was padding.
        """
        rng, sizes = np.random.default_rng((seed, 1)), rows["sizes"]  # not the numbers that the order is drawn from
        slips = np.array([len(found) - 1 for found in sizes])
        slipped, which = (rng.random(len(sizes)) for _ in range(2))
        variant = np.where((slipped < self.settings.misspelt_share) & (slips > 0), 1 + (which * slips).astype(np.int64), 0)
        length = np.array([found[at] for found, at in zip(sizes, variant, strict=True)], np.int32)
        return {**rows, "variant": variant, "length": length}

    def collate(self, rows: Columns, chosen: np.ndarray, weights: np.ndarray, pad: int) -> Batch:
        """A batch of the variants that `epoch_rows` chose; without it, of the rows as they are."""
        variants = [_Variant.of(rows, int(i)) for i in chosen]
        spoken = max(1, *(len(one.places) for one in variants))
        arrays = dict(zip(("ids", "mask", "types"), pad_reads(variants, pad), strict=True))
        arrays["places"] = np.zeros((len(variants), spoken), np.int64)
        arrays |= {name: np.full((len(variants), spoken), UNTAUGHT, np.int64) for name in ("kinds", "labels", "fixes")}
        for i, one in enumerate(variants):
            for name in ("places", "kinds", "labels", "fixes"):
                found = getattr(one, name)
                arrays[name][i, : len(found)] = found
        arrays["values"] = np.stack([rows["values"][int(i)] for i in chosen]).astype(np.int64).reshape(len(variants), -1)
        arrays["weight"] = weights.astype(np.float32)
        return Batch(arrays, int(arrays["mask"].sum()), arrays["mask"].size)

    # --- learning

    def loss(self, engine: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """Cross entropy of each decision (a field's value; a word's kind, label, correction), weighted by the row."""
        import torch
        from torch.nn import functional

        logits = self.outputs(engine, arrays)
        rows = torch.arange(len(logits), device=logits.device)[:, None].expand_as(arrays["places"])
        at_words, parts = logits[rows, arrays["places"]], head_slices(self.scheme)
        real = (arrays["kinds"] != UNTAUGHT)[..., None]
        means = (at_words * real).sum(1) / real.sum(1).clamp(min=1)
        asked = [(means[:, parts[f"field:{head.name}"]], arrays["values"][:, i]) for i, head in enumerate(self.scheme.fields)]
        if self.scheme.spans is not None:
            names = [("kind", "kinds"), ("label", "labels"), *([("fix", "fixes")] if self.scheme.fixes else [])]
            asked += [(at_words[..., parts[head]].flatten(0, 1), arrays[name].flatten()) for head, name in names]
        total, weight = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        for scores, wanted in asked:
            each = functional.cross_entropy(scores.float(), wanted, reduction="none", ignore_index=UNTAUGHT)
            weights = arrays["weight"].repeat_interleave(len(wanted) // len(arrays["weight"])) * (wanted != UNTAUGHT)
            total, weight = total + (each * weights).sum(), weight + weights.sum()
        return total, weight

    def outputs(self, module: Any, arrays: Mapping[str, Any]) -> Any:
        config = getattr(module, "module", module).config
        extra = {"token_type_ids": arrays["types"]} if getattr(config, "type_vocab_size", 0) >= 2 else {}
        return module(input_ids=arrays["ids"], attention_mask=arrays["mask"], **extra).logits

    def finish(self, folder: Path) -> None:
        """The I/O format, and the meaning of labels."""
        io_format.write_format(self.io_format, folder)
        (folder / LABELS).write_text(self.scheme.model_dump_json(indent=1) + "\n", encoding="utf-8")


def encoder_learner(
    tasks: Sequence[Task], training_set: Sequence[pa.Table], chosen: io_format.IOFormat, settings: Settings, queries: Sequence[str] = ()
) -> EncoderLearner:
    """The learner for one task. ConfigError when its answers are none that labels can hold."""
    if len(tasks) != 1:
        raise ConfigError("an encoder learns one task: its heads are that task's", where="sets", value=", ".join(t.name for t in tasks))
    if chosen.output != "json":
        raise ConfigError(
            "an encoder answers by labels", where="io_format.output", value=chosen.output, fix="leave io_format.output at json"
        )
    task, table = tasks[0], training_set[0]
    rows = [(query, task.parse(answer)[0]) for query, answer in zip(table["query"].to_pylist(), table["answer"].to_pylist(), strict=True)]
    found, _ = tagging.with_corrections(tagging.scheme(task.schema, task.name), rows, settings.corrections)
    query_only = chosen.model_copy(update={"prompt": "query_only"})
    return EncoderLearner(found, io_format.format_for(task, query_only, "encoder"), settings, tuple(queries))


def unlabelled_queries(store: Storage, refs: Sequence[tuple[Receipt, str]], human_labels: Sequence[pa.Table]) -> list[str]:
    """The queries of tables without answers, each once, without those of sets of human labels."""
    held = {key for table in human_labels for key in table["query_key"].to_pylist()}
    found: dict[bytes, str] = {}
    for receipt, name in refs:
        table = output_table(store, receipt, name, ["query_key", "query"])
        found.update(zip(table["query_key"].to_pylist(), table["query"].to_pylist(), strict=True))
    return [query for key, query in found.items() if key not in held]


@dataclass(frozen=True)
class _Variant:
    """One variant of an example."""

    ids: np.ndarray
    first: int
    places: np.ndarray
    fixes: np.ndarray
    kinds: np.ndarray
    labels: np.ndarray

    @staticmethod
    def of(rows: Columns, i: int) -> _Variant:
        sizes, spoken = rows["sizes"][i], len(rows["kinds"][i])
        at = int(rows["variant"][i]) if "variant" in rows else 0
        begin = int(sizes[:at].sum())
        here = slice(at * spoken, (at + 1) * spoken)
        return _Variant(
            rows["ids"][i][begin : begin + int(sizes[at])],
            int(rows["firsts"][i][at]),
            rows["places"][i][here],
            rows["fixes"][i][here],
            rows["kinds"][i],
            rows["labels"][i],
        )


# --- typing errors


def misspelt_variants(
    query: str, tags: tagging.Tags, scheme: tagging.Scheme, numbers: Mapping[str, int], copies: int, rng: random.Random
) -> list[tuple[str, list[int]]]:
    """Up to `copies` times `query` with one word misspelt, and the corrections that then hold.

    Where texts are corrected it is a known word, spelt correctly, and its correction restores it. Where an answer holds no text of
    the query it is any longer word: the answer stays. Else there are none, for a text would be learnt misspelt.
    """
    mends = scheme.spans is not None
    places = [
        at
        for at, (a, b) in enumerate(tagging.word_spans(query))
        if query[a:b].isalpha() and (_can_be_misspelt(query[a:b], at, tags, numbers) if mends else b - a >= SLIP_LETTERS)
    ]
    found: list[tuple[str, list[int]]] = []
    for _ in range(copies if places else 0):
        at = rng.choice(places)
        a, b = tagging.word_spans(query)[at]
        word = misspell_word(query[a:b], rng)
        if word in numbers or word == query[a:b]:
            continue  # another word, rightly spelt
        fixes = list(tags.fixes)
        if mends:
            fixes[at] = numbers[query[a:b]]
        found.append((query[:a] + word + query[b:], fixes))
    return found


def _can_be_misspelt(word: str, at: int, tags: tagging.Tags, numbers: Mapping[str, int]) -> bool:
    return tags.fixes[at] == tagging.KEEP and tags.kinds[at] != tagging.OUTSIDE and word in numbers


def misspell_word(word: str, rng: random.Random) -> str:
    """A letter left out, doubled, replaced, added or swapped with its neighbour."""
    at = rng.randrange(len(word))
    other = rng.choice("abcdefghijklmnopqrstuvwxyz") if word.isascii() else rng.choice(word)
    return rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[: at + 1] + word[at:],
            word[:at] + other + word[at + 1 :],
            word[:at] + other + word[at:],
            word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        )
    )
