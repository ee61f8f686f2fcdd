"""Distillation: batches lose nothing, LoRA merges to the same logits, training on human labels are refused, a killed run goes on."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import keep
from headtail.adapters.storage import Storage, put_folder, write_json
from headtail.core import io_format
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError, LeakError, TrainingError
from headtail.core.receipt import Receipt
from headtail.core.task import Task
from headtail.examples import example_data
from headtail.stages.distill import stage as distill
from headtail.stages.distill.base import BaseModelConfig, Shape, keep_layers, load_base, make_decoder_base
from headtail.stages.distill.batches import collate, encode_examples, example_columns, plan_epoch, steps_of
from headtail.stages.distill.learner import DecoderLearner
from headtail.stages.distill.merge import merge_lora
from headtail.stages.distill.tokenizer import train_tokenizer
from headtail.stages.distill.train import add_adapters, learning_rate, tells_apart

OFF = TrackingConfig(enabled=False)
MODELS = Path(distill.__file__).parents[2] / "examples" / "models"
TINY = Shape(vocabulary=400, hidden=32, layers=3, heads=2, feed_forward=64, positions=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = (found for _, found, _ in example_data.sample(example_data.Config(seed=5), 300, "train/x"))
    return train_tokenizer((text for m in found for text in (m.text, json.dumps(example_data.right_answers(m)["query_segmentation"]))), 400)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=400), st.integers(1, 8), st.integers(1, 4), st.integers(0, 5), st.integers(0, 900)
)
@settings(max_examples=80)
def test_every_row_once_whatever_divides(lengths: list[int], rows: int, workers: int, seed: int, tokens: int) -> None:
    cut = {"rows": rows, "workers": workers, "tokens": tokens}
    steps = plan_epoch(np.array(lengths), seed=seed, **cut)
    assert all(len(step) == workers and all(len(part) <= rows for part in step) for step in steps)
    assert sorted(np.concatenate([part for step in steps for part in step]).tolist()) == list(range(len(lengths)))
    for step in steps:
        assert max(map(len, step)) - min(map(len, step)) <= 1  # nobody waits for a worker with more to do
        cells = [len(part) * max(lengths[i] for i in part) for part in step if len(part)]
        assert not tokens or all(one <= tokens for one in cells) or max(map(len, step)) == 1
    assert steps_of(lambda _: np.array(lengths), seed=seed, epochs=1.0, **cut) == [len(steps)]


def test_broken_epochs_are_counted() -> None:
    lengths = np.full(100, 7)
    assert steps_of(lambda _: lengths, rows=5, workers=2, seed=0, tokens=0, epochs=2.5) == [10, 10, 5]
    assert steps_of(lambda _: lengths, rows=5, workers=2, seed=0, tokens=14, epochs=0.3) == [8]


@pytest.mark.parametrize("rows, tokens", [(16, 0), (16, 1200), (64, 2000)])
def test_buckets_waste_little(rows: int, tokens: int) -> None:
    lengths = np.random.default_rng(0).gamma(6, 15, 20_000).astype(int) + 10  # 10 to 400 tokens, skewed as prompts are
    steps = plan_epoch(lengths, rows=rows, workers=2, seed=0, tokens=tokens)
    padded = sum(lengths[part].max() * len(part) for step in steps for part in step)
    assert lengths.sum() / padded > 0.95


def test_order_depends_on_seed_alone() -> None:
    lengths = np.arange(500) % 50 + 1
    a, b, c = (np.concatenate([p for step in plan_epoch(lengths, rows=8, workers=2, seed=s) for p in step]) for s in (1, 1, 2))
    assert (a == b).all()
    assert (a != c).any()


def test_only_the_answer_is_labelled() -> None:
    batch = collate([np.array([5, 6, 7, 8]), np.array([9, 10])], np.array([2, 1]), np.array([1.0, 0.5]), pad=0)
    assert batch.arrays["labels"].tolist() == [[-100, -100, 7, 8], [-100, 10, -100, -100]]
    assert batch.arrays["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (batch.real_tokens, batch.tokens) == (6, 8)


def test_an_example_never_sees_another(tokenizer: Any) -> None:
    """Perturbation: other rows of the batch, and what stands in the padding, change nothing of a row's loss."""
    import torch

    learner, model = DecoderLearner(), make_decoder_base(TINY, tokenizer, 0).eval()
    ids = [np.arange(10, 10 + n) for n in (9, 30, 17)]

    def loss_of_first(others: list[np.ndarray], pad: int) -> float:
        batch = learner.collate({"ids": [ids[0], *others], "answer_start": np.array([4, 4, 4])}, np.arange(3), np.array([1.0, 0, 0]), pad)
        with torch.no_grad():
            total, weight = learner.loss(model, {name: torch.from_numpy(array) for name, array in batch.arrays.items()})
        return float(total / weight)

    found = [loss_of_first(ids[1:], 0), loss_of_first([row + 50 for row in ids[1:]], 0), loss_of_first(ids[1:], 77)]
    assert max(found) - min(found) < 1e-6
    assert abs(loss_of_first([row[:5] for row in ids[1:]], 0) - found[0]) < 1e-5  # another width: other kernels, same sum


def test_the_loss_is_the_plain_one_though_only_answers_meet_the_head(tokenizer: Any) -> None:
    import torch
    from torch.nn import functional

    learner, model = DecoderLearner(), make_decoder_base(TINY, tokenizer, 0)
    rows = {"ids": [np.arange(10, 10 + n) for n in (9, 30)], "answer_start": np.array([4, 20])}
    batch = learner.collate(rows, np.arange(2), np.array([1.0, 3.0]), 0)
    arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    total, weight = learner.loss(model, arrays)
    total.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=arrays["ids"], attention_mask=arrays["mask"]).logits
    assert logits.shape[:2] == arrays["ids"].shape, "the head sees all tokens again"
    each = [
        functional.cross_entropy(logits[i, a - 1 : n - 1], arrays["ids"][i, a:n], reduction="sum") for i, a, n in ((0, 4, 9), (1, 20, 30))
    ]
    wanted = each[0] + 3 * each[1]
    wanted.backward()
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(weight) == 5 + 30
    assert torch.allclose(gradient, model.model.layers[0].mlp.up_proj.weight.grad, atol=1e-6)


def test_columns_are_views_with_the_same_values() -> None:
    table = pa.concat_tables([pa.table({"ids": [[1, 2], [], [3]], "weight": [1.0, 2.0, 3.0]}), pa.table({"ids": [[4]], "weight": [4.0]})])
    found = example_columns(table.slice(1))
    assert [row.tolist() for row in found["ids"]] == [[], [3], [4]]
    assert found["weight"].tolist() == [2.0, 3.0, 4.0]


def training_table(rows: list[tuple[str, dict[str, Any]]], task: Task) -> pa.Table:
    from headtail.core.keys import query_key
    from headtail.core.rows import TRAINING_SET, with_side_inputs

    columns = [[query_key(q) for q, _ in rows], [q for q, _ in rows], [task.dump(a) for _, a in rows], [1.0] * len(rows)]
    tail = [["head"] * len(rows), ["teacher"] * len(rows), [None] * len(rows), [["blue fox"]] * len(rows)]
    schema = with_side_inputs(TRAINING_SET, ["businesses"])
    return pa.table([pa.array(c, f.type) for c, f in zip(columns + tail, schema, strict=True)], schema=schema)


def test_encode_splits_prompt_and_answer(tokenizer: Any, segmentation: Task) -> None:
    answer = {"segments": [{"text": "pizza", "label": "topic"}]}
    tokens = encode_examples(segmentation, tokenizer, training_table([("pizza", answer)], segmentation), 400, set()).to_pylist()[0]
    prompt, target = tokens["ids"][: tokens["answer_start"]], tokens["ids"][tokens["answer_start"] :]
    assert tokenizer.decode(prompt).endswith("Businesses viewed: blue fox\nQuery: pizza<|end|><|assistant|>")
    assert tokenizer.decode(target) == segmentation.target(answer) + "<|end|>"


@pytest.mark.parametrize("begins", [True, False])
def test_a_base_that_begins_its_texts_begins_a_bare_prompt(tokenizer: Any, intent: Task, begins: bool) -> None:
    """Gemma knew texts that begin with <bos> alone. A tokenizer that has such a token and does not use it changes nothing."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, learner = (
        copy.deepcopy(tokenizer),
        DecoderLearner(io_format=io_format.format_for(intent, io_format.IOFormat(prompt="query_only"))),
    )
    tokenizer.bos_token = "<|user|>"  # a special token that is there
    if begins:
        pair = ("<|user|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[pair])
    learner._prompt_ids(tokenizer)
    row = learner.encode(intent, tokenizer, training_table([("pizza <|user|>", {"intent": "price"})], intent), 400, set()).to_pylist()[0]
    prompt = row["ids"][: row["answer_start"]]
    assert (prompt[0] == tokenizer.bos_token_id) == begins
    assert prompt.count(tokenizer.bos_token_id) == begins, "what a person typed is text"
    assert tokenizer.decode(prompt) == ("<|user|>" if begins else "") + "pizza <|user|>\n"


def test_long_and_invalid_rows_are_errors_that_name_the_query(tokenizer: Any, segmentation: Task) -> None:
    good = training_table([("pizza place", {"segments": []})], segmentation)
    with pytest.raises(TrainingError, match="too long") as error:
        encode_examples(segmentation, tokenizer, good, 10, set())
    assert "pizza place" in error.value.where
    bad = good.set_column(2, "answer", pa.array(['{"segments": [1]}']))
    with pytest.raises(TrainingError, match="not valid"):
        encode_examples(segmentation, tokenizer, bad, 400, set())


@given(st.text(max_size=80))
def test_tokenizer_writes_any_text(tokenizer: Any, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert 0.09 < rates[-1] < 0.12


@pytest.mark.slow
def test_adapters_tell_signs_apart_that_the_base_never_met(tokenizer: Any, intent: Task, tmp_path: Path) -> None:
    """Two answers, two signs, embeddings alike: without their own the best is a coin's log(2). What is learnt outlives the merge."""
    import torch

    made, tokenizer = io_format.format_for(intent, io_format.IOFormat(prompt="query_only", output="compact")), copy.deepcopy(tokenizer)
    assert io_format.DEFAULT.symbols(tokenizer) == []
    rows = training_table([("pizza", {"intent": "price"}), ("noodles", {"intent": "booking"})], intent)
    lora, losses = distill.Lora(rank=8, alpha=16), {}
    for learner in (DecoderLearner(io_format=made), DecoderLearner(io_format=made.model_copy(update={"output": "json"}))):
        torch.manual_seed(0)
        base = make_decoder_base(TINY, learner._prompt_ids(tokenizer), 0)
        signs = made.symbols(tokenizer)
        told = base.get_input_embeddings().weight.data.mul_(30)  # as large as a trained model's
        told[signs] = told[signs[0]].clone()
        for saved in (base, tokenizer):
            saved.save_pretrained(tmp_path / "base")
        model = add_adapters(base, tokenizer, learner, lora)
        examples = example_columns(DecoderLearner(io_format=made).encode(intent, tokenizer, rows, 100, set()))
        batch = learner.collate(examples, np.arange(2), np.ones(2), tokenizer.pad_token_id)
        arrays = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(100):
            total, weight = learner.loss(model, arrays)
            optimiser.zero_grad()
            (total / weight).backward()
            optimiser.step()
        losses[learner.io_format.output] = 2 * (total / weight).item()  # a row's: its end is the other token
        model.save_pretrained(tmp_path / learner.io_format.output)
    assert losses["compact"] < 0.05
    assert losses["json"] > 0.69
    tokenizer.save_pretrained(tmp_path / "merged")
    drift = merge_lora(
        DecoderLearner(io_format=made), load_base(str(tmp_path / "base"))[0], tmp_path / "compact", tmp_path / "merged", [batch]
    )
    assert drift < 0.02
    merged = load_base(str(tmp_path / "merged"))[0]
    total, weight = learner.loss(merged, arrays)
    assert 2 * (total / weight).item() < 0.05


def test_layers_are_taken_evenly(tokenizer: Any) -> None:
    model = make_decoder_base(TINY.model_copy(update={"layers": 6}), tokenizer, 0)
    first, last = model.model.layers[0], model.model.layers[5]
    keep_layers(model, 3)
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (3, 3)
    assert model.model.layers[0] is first
    assert model.model.layers[2] is last


def test_symbols_that_a_base_tells_apart_are_not_trained(tokenizer: Any, intent: Task) -> None:
    """The shipped base knows none of them; a base that knows them is spared a copy of all its embeddings at each step."""
    made = io_format.format_for(intent, io_format.IOFormat(prompt="query_only", output="compact"))
    shipped, its_own = load_base(str(MODELS / "student-base"))
    assert not tells_apart(shipped, made.symbols(its_own))
    signs, learner = made.symbols(tokenizer), DecoderLearner(io_format=made)
    for alike in (False, True):
        known = make_decoder_base(TINY, tokenizer, 0)
        table = known.get_input_embeddings().weight.data
        if alike:
            table[signs[3]] = table[signs[5]] * 2
        adapted = add_adapters(known, tokenizer, learner, distill.Lora())
        assert adapted.peft_config["default"].trainable_token_indices == (signs if alike else None)


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "smollm3"])
def test_a_cut_model_keeps_what_is_said_of_its_layers(tokenizer: Any, kind: str, tmp_path: Path) -> None:
    """Windows and rotary positions by layer: a cut folder loads, and gives the logits of the model that was cut."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    each: dict[str, Any] = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 8}
    if kind == "qwen3":
        each |= {"use_sliding_window": True}
    elif kind == "smollm3":
        each |= {"no_rope_layers": [1, 1, 1, 0, 0, 0], "use_sliding_window": True}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), head_dim=16, initializer_range=0.3, **sizes, **special, **each)
    model = AutoModelForCausalLM.from_config(config).eval()
    keep_layers(model, 3)
    assert list(model.config.layer_types) == ["sliding_attention"] * 2 + ["full_attention"]
    assert getattr(model.config, "no_rope_layers", None) in (None, [1, 1, 0])
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    again, ids = load_base(str(tmp_path))[0].eval(), torch.arange(10, 50)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-5)


def test_a_student_starts_from_layers_of_a_trained_teacher(store: Storage, tokenizer: Any, tmp_path: Path) -> None:
    """base.model=distill/... with base.layers: cut once, kept in the store, and found there by a run that goes on."""
    from headtail.adapters.tracking import Tracker
    from headtail.engines.models import resolve_weights
    from headtail.stages.base import Stage
    from headtail.stages.distill.launch import prepare_base

    teacher = make_decoder_base(TINY, tokenizer, 7)
    for saved in (teacher, tokenizer):
        saved.save_pretrained(tmp_path / "teacher")
    files = put_folder(store, tmp_path / "teacher", "distill/t/model")
    outputs = {ref.path.removeprefix("distill/t/"): ref for ref in files}
    started = "2030-01-01T00:00:00+00:00"
    made = Receipt(stage="distill", fingerprint="t" * 16, path="distill/t", started=started, seconds=1.0, outputs=outputs)
    write_json(store, "distill/t/receipt.json", made.model_dump(mode="json"))
    config = distill.Config(root=store.root, tracking=OFF, base=BaseModelConfig(model="distill/t", layers=2))
    found = resolve_weights("distill/t", "", store)
    for turn in ("first", "again"):
        (tmp_path / turn).mkdir()
        stage = Stage("distill", store, "distill/s", Tracker(OFF, store.root), "", tmp_path / turn)
        base = prepare_base(config, stage, DecoderLearner(), [], found)
        model, _ = DecoderLearner().load(base.path)
        assert model.config.num_hidden_layers == 2
        assert (model.model.layers[1].mlp.up_proj.weight == teacher.model.layers[2].mlp.up_proj.weight).all()
        assert all(store.exists(file) for file in base.files)
        assert "2 of its layers" in base.name
        store.replace("distill/t/model/config.json", b"gone") if turn == "first" else None


def test_lora_on_random_weights_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="noise"):
        distill.run(distill.Config(root=root, base=BaseModelConfig(shape=TINY)))


def test_bf16_without_master_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no fp32 master weights"):
        distill.Config(zero_stage=0, precision="bf16")
    assert distill.Config(zero_stage=0, precision="fp32").zero_stage == 0


@pytest.fixture
def rows(root: str) -> Receipt:
    return example_data.run(example_data.Config(root=root, tracking=OFF, events=500, days=2, train=160, labels=40, seed=3))


def test_leak_with_labelled_queries_is_an_error(root: str, rows: Receipt) -> None:
    ref = f"{rows.path}:train_query_segmentation"
    config = distill.Config(
        root=root, tracking=OFF, sets=(distill.TrainingSet(training_set=ref),), labels=(ref,), base=BaseModelConfig(shape=TINY), lora=None
    )
    with pytest.raises(LeakError, match="in the human labels"):
        distill.run(config)


def test_empty_training_set_is_an_error(root: str, rows: Receipt) -> None:
    from headtail.adapters.storage import open_storage, read_table

    store = open_storage(root)
    empty = read_table(store, rows.output("train_query_segmentation").path).slice(0, 0)
    emptied = keep(store, "example-data", "0123456789abcdef", {"train_query_segmentation": empty})
    with pytest.raises(InputError, match="no training rows"):
        distill.run(
            distill.Config(
                root=root,
                tracking=OFF,
                sets=(distill.TrainingSet(training_set=f"{emptied.path}:train_query_segmentation"),),
                labels=(),
                base=BaseModelConfig(shape=TINY),
                lora=None,
            )
        )


def _short(root: str, rows: Receipt) -> dict[str, Any]:
    sets = (distill.TrainingSet(training_set=f"{rows.path}:train_query_segmentation"),)
    return {"root": root, "tracking": OFF, "sets": sets, "labels": (), "log_steps": 5, "batch_rows": 8}


@pytest.mark.slow
def test_adapters_on_some_layers_of_an_earlier_student(root: str, rows: Receipt, train_here: None) -> None:
    """Real PEFT: fewer layers, stopped early with the best weights, merged; the second run does nothing."""
    common = _short(root, rows)
    made = distill.run(distill.Config(**common, base=BaseModelConfig(shape=TINY), lora=None, max_steps=2))
    stopping = distill.Stopping(every=2, patience=2, min_delta=5.0)  # nothing falls by that much: stop at the third look, take the first
    config = distill.Config(**common, base=BaseModelConfig(model=made.path, layers=2), epochs=1, early_stopping=stopping)
    student = distill.run(config)
    assert (student.metrics["steps"], student.metrics["taken_step"], student.result.stopped_early) == (6, 2, True)
    assert student.metrics["merge_drift"] < 0.05
    assert student.metrics["params"] < made.metrics["params"]
    assert student.metrics["real_token_share"] > 0.95
    assert distill.run(config).reused
