"""Encoder and seq2seq students: examples, losses, and the whole way from training rows to answers."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import keep
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core import io_format, tagging
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, TrainingError
from headtail.core.keys import normalise, query_key
from headtail.core.rows import with_side_inputs
from headtail.core.spelling import similar
from headtail.core.task import Task
from headtail.engines import ModelConfig, Request, open_engine
from headtail.engines.words import WordTokenizer
from headtail.examples import example_data
from headtail.stages import distill, evaluate, precompute
from headtail.stages.distill.base import BaseModelConfig, Shape
from headtail.stages.distill.batches import UNTAUGHT, epoch_seed, example_columns, plan_epoch
from headtail.stages.distill.encoder import (
    NOISED,
    EncoderLearner,
    Settings,
    encoder_learner,
    misspell_word,
    misspelt_variants,
    unlabelled_queries,
)
from headtail.stages.distill.learner import Learner
from headtail.stages.distill.masked import mask_words, pretrain
from headtail.stages.distill.seq2seq import Seq2SeqLearner
from headtail.stages.distill.tokenizer import train_word_tokenizer
from test_engines_encoder import TINY, training_table
from test_tagging import PLAIN

OFF = TrackingConfig(enabled=False)
SMALL = Shape(vocabulary=600, hidden=64, layers=2, heads=2, feed_forward=128, positions=64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two threads that wait for each other by spinning take minutes where the machine does other work too."""
    import torch

    torch.set_num_threads(1)


def rows_of(task: Task, n: int, seed: int = 5) -> list[tuple[str, Any]]:
    found = example_data.sample(example_data.Config(seed=seed, typo_share=0.04), n, "train/x")
    return [(normalise(text), example_data.right_answers(meaning)[task.name]) for text, meaning, _ in found]


@pytest.fixture(scope="module")
def training_set(segmentation: Task) -> pa.Table:
    return training_table(rows_of(segmentation, 150), segmentation)


@pytest.fixture(scope="module")
def learner(segmentation: Task, training_set: pa.Table) -> EncoderLearner:
    return encoder_learner([segmentation], [training_set], io_format.IOFormat(), Settings(pretrain_epochs=0), ["a query more"])


@pytest.fixture(scope="module")
def tokenizer(learner: EncoderLearner, segmentation: Task, training_set: pa.Table) -> Any:
    return train_word_tokenizer(learner.texts(segmentation, training_set), 600)


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def taught(learner: Learner, task: Task, training_set: pa.Table, shape: Shape, steps: int, rate: float, folder: Path) -> Path:
    """A student trained by a plain loop, saved as `distill` saves it."""
    import torch

    model, tokenizer = learner.make(shape, learner.texts(task, training_set), 0)
    rows = example_columns(learner.encode(task, tokenizer, training_set, 256, set()))
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=rate), np.random.default_rng(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        chosen = rng.choice(len(rows["length"]), min(64, len(rows["length"])), replace=False)
        batch = learner.collate(learner.epoch_rows(rows, step), chosen, rows["weight"][chosen], tokenizer.pad_token_id)
        total, weight = learner.loss(model, as_tensors(batch.arrays))
        optimizer.zero_grad()
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    learner.finish(folder)
    return folder


# --- examples


def test_examples_hold_a_row_as_it_is_and_with_slips(
    learner: EncoderLearner, tokenizer: Any, segmentation: Task, training_set: pa.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    out = set(training_set["query_key"].to_pylist()[:20])
    table = learner.encode(segmentation, tokenizer, training_set, 256, out)
    assert table.num_rows == training_set.num_rows
    assert re.search(r"labels       hold 9\d\.\d% of 150", capsys.readouterr().err)
    for query, row in zip(training_set["query"].to_pylist(), table.to_pylist(), strict=True):
        reader, spoken = WordTokenizer(tokenizer), tagging.word_spans(query)
        first = row["ids"][: row["sizes"][0]]
        assert first == reader.read(query).ids
        assert len(row["kinds"]) == len(row["labels"]) == len(spoken)
        assert len(row["places"]) == len(row["fixes"]) == len(spoken) * len(row["sizes"])
        clean = row["fixes"][: len(spoken)]
        assert len(row["sizes"]) <= 1 + NOISED
        assert row["length"] == max(row["sizes"])
        for variant in range(1, len(row["sizes"])):
            fixes = row["fixes"][variant * len(spoken) : (variant + 1) * len(spoken)]
            (at,) = [i for i, (fix, before) in enumerate(zip(fixes, clean, strict=True)) if fix != before]
            assert learner.scheme.corrections[fixes[at] - tagging.FIRST_FIX] == query[slice(*spoken[at])]
    assert sum(map(len, table["sizes"].to_pylist())) > 2 * table.num_rows
    held = table.filter(table["held_out"].to_numpy())
    assert held.num_rows == 20
    assert all(len(sizes) == 1 for sizes in held["sizes"].to_pylist())  # judged as they are


def test_batches_are_planned_by_what_is_shown(learner: EncoderLearner, tokenizer: Any, segmentation: Task) -> None:
    """Slips and all, at least 95 % of a batch's tokens are real; and there are as many slips as were asked for."""
    rows = example_columns(
        learner.encode(segmentation, tokenizer, training_table(rows_of(segmentation, 1200, 6), segmentation), 256, set())
    )
    several = np.array([len(sizes) > 1 for sizes in rows["sizes"]])
    met: list[set[int]] = [set() for _ in several]
    for number in range(150):
        shown = learner.epoch_rows(rows, epoch_seed(3, number))
        for i, variant in enumerate(shown["variant"]):
            met[i].add(int(variant))
    assert [len(found) for found in met] == [len(sizes) for sizes in rows["sizes"]], "in time every variant is shown"
    assert several.mean() > 0.5
    assert np.mean(shown["variant"][several] > 0) == pytest.approx(learner.settings.misspelt_share, abs=0.06)
    assert np.array_equal(shown["variant"], learner.epoch_rows(rows, epoch_seed(3, 149))["variant"]), "a run that goes on shows the same"
    real = cells = 0
    for step in plan_epoch(shown["length"], rows=32, workers=2, seed=epoch_seed(3, 149)):
        for part in step:
            batch = learner.collate(shown, part, np.ones(len(part), np.float32), 0)
            assert batch.real_tokens == shown["length"][part].sum()
            real, cells = real + batch.real_tokens, cells + batch.tokens
    print(f"real tokens {real / cells:.4f}")
    assert real / cells >= 0.95


def test_rows_that_labels_cannot_hold_are_not_learnt_from(learner: EncoderLearner, tokenizer: Any, segmentation: Task) -> None:
    good = [("pizza", {"segments": [{"text": "pizza", "label": "topic"}]})] * 2
    bad = [("tea houe", {"segments": [{"text": "tea house", "label": "topic"}, {"text": "hours", "label": "time"}]})]
    table = learner.encode(segmentation, tokenizer, training_table(good + bad, segmentation), 256, set())
    assert table["exact"].to_pylist() == [True, True, False]
    assert table["weight"].to_pylist() == [1.0, 1.0, 0.0]
    nearest = EncoderLearner(learner.scheme, learner.io_format, Settings(inexact="nearest"))
    assert nearest.encode(segmentation, tokenizer, training_table(good + bad, segmentation), 256, set())["weight"].to_pylist() == [1.0] * 3
    with pytest.raises(ConfigError, match="cannot hold most"):
        learner.encode(segmentation, tokenizer, training_table(bad, segmentation), 256, set())


def test_a_long_or_invalid_row_is_an_error_that_names_the_query(learner: EncoderLearner, tokenizer: Any, segmentation: Task) -> None:
    good = training_table([("pizza place", {"segments": [{"text": "pizza place", "label": "topic"}]})], segmentation)
    with pytest.raises(TrainingError, match="too long") as error:
        learner.encode(segmentation, tokenizer, good, 2, set())
    assert "pizza place" in error.value.where
    with pytest.raises(TrainingError, match="not valid"):
        learner.encode(segmentation, tokenizer, good.set_column(2, "answer", pa.array(['{"segments": [1]}'])), 400, set())


def test_a_slip_is_one_slip_and_never_another_known_word() -> None:
    rng = random.Random(0)
    for _ in range(200):
        assert similar("barbecue", misspell_word("barbecue", rng))
    scheme = PLAIN.model_copy(update={"corrections": ("cat", "cut", "cot", "coat")})
    made = tagging.Tags((tagging.BEGIN,), (0,), (tagging.KEEP,), (), True)
    found = misspelt_variants("cat", made, scheme, tagging.fix_numbers(scheme), 200, rng)
    assert found
    assert all(text not in scheme.corrections and fixes == [tagging.FIRST_FIX] for text, fixes in found)


def test_slips_do_not_teach_misspelt_texts(segmentation: Task, intent: Task) -> None:
    """A task that answers with texts but never corrects them gets none; one that answers with a class gets them anywhere."""
    rng, kept = random.Random(0), tagging.Tags((tagging.BEGIN,) * 2, (0,) * 2, (tagging.KEEP,) * 2, (), True)
    assert misspelt_variants("sushi tonight", kept, tagging.scheme(segmentation.schema), {}, 9, rng) == []
    found = misspelt_variants("sushi tonight", kept, tagging.scheme(intent.schema), {}, 9, rng)
    assert len(found) > 5
    assert all(text != "sushi tonight" and fixes == [tagging.KEEP] * 2 for text, fixes in found)


def test_a_batch_is_the_same_each_time_and_shows_no_row_another(
    learner: EncoderLearner, tokenizer: Any, segmentation: Task, training_set: pa.Table
) -> None:
    import torch

    model, _ = learner.make(TINY, learner.texts(segmentation, training_set), 0)
    small = train_word_tokenizer(learner.texts(segmentation, training_set), TINY.vocabulary)
    rows = example_columns(learner.encode(segmentation, small, training_set, 256, set()))
    chosen = np.array([3, 40, 77, 9])
    first, second = (learner.collate(rows, chosen, np.ones(4, np.float32), 0) for _ in range(2))
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert first.real_tokens <= first.tokens
    model.eval()
    whole = learner.outputs(model, as_tensors(first.arrays))
    changed = {**first.arrays, "ids": first.arrays["ids"].copy()}
    changed["ids"][1:] = 7
    again = learner.outputs(model, as_tensors(changed))
    real = int(first.arrays["mask"][0].sum())
    torch.testing.assert_close(whole[0, :real], again[0, :real])  # the other rows changed, this one's outputs did not
    total, weight = learner.loss(model, as_tensors(first.arrays))
    some = {**first.arrays, "weight": np.array([1, 0, 1, 1], np.float32)}
    other = {**some, "ids": some["ids"].copy()}
    other["ids"][1] = 7
    assert learner.loss(model, as_tensors(some))[1] < weight
    torch.testing.assert_close(learner.loss(model, as_tensors(some))[0], learner.loss(model, as_tensors(other))[0])
    assert total.requires_grad


def test_workers_get_the_learner_without_its_queries(learner: EncoderLearner, segmentation: Task, training_set: pa.Table) -> None:
    assert "a query more" in list(learner.texts(segmentation, training_set))
    there = pickle.loads(pickle.dumps(learner))
    assert there == learner
    assert there.queries == ()


def test_one_task_whose_answers_fit(segmentation: Task, intent: Task, training_set: pa.Table) -> None:
    with pytest.raises(ConfigError, match="one task"):
        encoder_learner([segmentation, intent], [training_set, training_set], io_format.IOFormat(), Settings())
    with pytest.raises(ConfigError, match="answers by labels"):
        encoder_learner([segmentation], [training_set], io_format.IOFormat(output="compact"), Settings())


def test_further_queries_are_those_of_no_labelled_set(store: Storage) -> None:
    table = pa.table({"query_key": [query_key(q) for q in ("a", "b", "c")], "query": ["a", "b", "c"]})
    made = keep(store, "plan", "ab" * 8, {"student_rows": table})
    assert unlabelled_queries(store, [(made, "student_rows"), (made, "student_rows")], [table.slice(1, 1)]) == ["a", "c"]


# --- a base made here


def test_whole_words_are_hidden_and_asked_for_there_alone(tokenizer: Any) -> None:
    reader, rng = WordTokenizer(tokenizer), np.random.default_rng(0)
    reads = [reader.read("best barbecue in chattanooga"), reader.read("pizza")]
    ids, mask, wanted = (x.numpy() for x in mask_words(reads, reader, tokenizer.mask_token_id, len(tokenizer), rng))
    for i, found in enumerate(reads):
        asked = wanted[i] != UNTAUGHT
        assert asked.any()
        assert (wanted[i][asked] == np.array([*found.ids, *[0] * (ids.shape[1] - len(found.ids))])[asked]).all()
        assert not asked[0]
        assert mask[i].sum() == len(found.ids)
        ends = [*found.places[1:], found.first - 1]
        assert all(len(set(asked[a:b])) == 1 for a, b in zip(found.places, ends, strict=True))


def test_pretraining_learns_the_queries_words(tokenizer: Any, training_set: pa.Table) -> None:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=640, max_position_embeddings=64, **size))
    first = pretrain(model, tokenizer, training_set["query"].to_pylist(), 1, 3e-3, 0)
    assert pretrain(model, tokenizer, training_set["query"].to_pylist(), 30, 5e-3, 0) < first - 0.7


# --- students that answer


def test_an_encoder_learns_to_answer_and_to_spell(segmentation: Task, training_set: pa.Table, tmp_path: Path) -> None:
    learner = encoder_learner([segmentation], [training_set], io_format.IOFormat(), Settings(pretrain_epochs=0))
    folder = taught(learner, segmentation, training_set, SMALL, 160, 4e-3, tmp_path / "model")
    engine = open_engine(ModelConfig(), str(folder), None, {})
    rows = rows_of(segmentation, 60)
    found = {m.id: m for m in engine.generate(Request(i, [{"role": "user", "content": q}]) for i, (q, _) in enumerate(rows))}
    right = [segmentation.score(answer, segmentation.parse(found[i].text)[0]).right for i, (_, answer) in enumerate(rows)]
    assert np.mean(right) > 0.9
    numbers, rng = tagging.fix_numbers(learner.scheme), random.Random(1)
    asked = []
    for query, answer in rows:
        found_labels = tagging.encode_tags(learner.scheme, query, answer, numbers)
        asked += [(text, answer) for text, _ in misspelt_variants(query, found_labels, learner.scheme, numbers, 1, rng)]
    assert len(asked) > 20
    mended = list(engine.generate(Request(i, [{"role": "user", "content": text}]) for i, (text, _) in enumerate(asked)))
    assert np.mean([segmentation.parse(made.text)[0] == asked[made.id][1] for made in mended]) > 0.4  # slips it never saw


def test_a_seq2seq_student_learns_to_answer(intent: Task, tmp_path: Path) -> None:
    rows = rows_of(intent, 40)
    training_set = training_table(rows, intent)
    learner = Seq2SeqLearner(io_format.format_for(intent, io_format.IOFormat(prompt="query_only"), "seq2seq"))
    folder = taught(learner, intent, training_set, SMALL.model_copy(update={"layers": 1}), 150, 1e-2, tmp_path / "model")
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 24}
    engine = open_engine(ModelConfig(), str(folder), None, sampling)
    found = {m.id: m for m in engine.generate(Request(i, [{"role": "user", "content": q}]) for i, (q, _) in enumerate(rows))}
    assert sorted(found) == list(range(40))
    assert np.mean([intent.parse(found[i].text)[0] == answer for i, (_, answer) in enumerate(rows)]) > 0.8
    for made in found.values():
        assert made.finish_reason in ("stop", "length")
        assert "".join(made.token_texts) == made.text
        assert len(made.token_logprobs) == made.tokens_out == len(made.token_texts)
        assert made.finish_reason == "length" or 0 < np.exp(np.mean(made.token_logprobs)) <= 1
    (cut,) = open_engine(ModelConfig(), str(folder), None, {**sampling, "max_tokens": 2}).generate(
        [Request(0, [{"role": "user", "content": "x"}])]
    )
    assert cut.finish_reason == "length"
    several = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 24, "n": 3, "seed": 1}
    (made,) = open_engine(ModelConfig(), str(folder), None, several).generate([Request(0, [{"role": "user", "content": rows[0][0]}])])
    assert len(made.samples) == 2
    long = [Request(0, [{"role": "user", "content": "word " * 2000}])]
    assert "must fit" in next(iter(engine.generate(long))).error


@pytest.mark.slow
@pytest.mark.parametrize("student", ["encoder", "seq2seq"])
def test_the_whole_way(root: str, train_here: None, answer_here: None, intent: Task, student: str) -> None:
    """Training rows -> distil -> precompute with what came out -> evaluate against people's answers."""
    rows = example_data.run(example_data.Config(root=root, tracking=OFF, events=500, days=2, train=400, labels=60, seed=3))
    store = open_storage(root)
    labels = output_table(store, rows, "human_labels_query_intent")
    asked = with_side_inputs(pa.schema([("query_key", pa.binary(16)), ("query", pa.string()), ("answer", pa.string())]), ())
    plain = [
        (query_key(normalise(q)), normalise(q), a) for q, a in zip(labels["query"].to_pylist(), labels["answer"].to_pylist(), strict=True)
    ]
    table = pa.table([pa.array(column, kind.type) for column, kind in zip(zip(*plain, strict=True), asked, strict=True)], schema=asked)
    table = table.append_column("count", pa.array([1] * table.num_rows, pa.int64()))
    table = table.append_column("stratum", pa.array(["tail"] * table.num_rows)).append_column(
        "eval_only", pa.array([True] * table.num_rows)
    )
    held = keep(store, "plan", "cd" * 8, {"human_labels": table})
    made = distill.run(
        distill.Config(
            root=root,
            tracking=OFF,
            student=student,
            io_format=io_format.IOFormat(prompt="query_only"),
            sets=(distill.TrainingSet(task="query_intent", training_set=f"{rows.path}:train_query_intent"),),
            labels=(f"{held.path}:human_labels",),
            near_labels=None,  # so little data says everything twice
            base=BaseModelConfig(shape=SMALL),
            lora=None,
            encoder=Settings(pretrain_epochs=2),
            epochs=8,
            batch_rows=16,
            learning_rate=5e-3,
            precision="fp32",
        )
    )
    assert "model/headtail.json" in made.outputs
    assert ("model/labels.json" in made.outputs) == (student == "encoder")
    config = {"root": root, "tracking": OFF, "task": "query_intent", "inputs": (f"{held.path}:human_labels",), "source": "batch_student"}
    answered = precompute.run(precompute.Config(**config, model=ModelConfig(model=made.path)))
    assert answered.rows["answered"] + answered.rows["invalid"] + answered.rows["truncated"] == answered.rows["in"] == table.num_rows
    assert answered.result.engine["engine"] == {"encoder": "encoder", "seq2seq": "transformers"}[student]
    quality = evaluate.run(
        evaluate.Config(
            root=root, tracking=OFF, task="query_intent", labels=f"{held.path}:human_labels", answers={"batch_student": answered.path}
        )
    )
    # A third of the human labels are the largest class. A T5 from random weights and 400 rows learns to write answers, hardly which one.
    assert quality.metrics["quality/batch_student/all"] > (0.6 if student == "encoder" else 0.0)
    if student == "encoder":
        shards = [name for name in answered.outputs if name.startswith("answers/")]
        sure = [c for name in shards for c in output_table(store, answered, name)["confidence"].to_pylist()]
        assert all(0 < one <= 1 for one in sure)
