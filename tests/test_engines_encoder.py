"""Encoder students as an engine: each row has its own answer, whatever it is batched with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from headtail.batch.parsed_answer import confidence
from headtail.core import io_format, tagging
from headtail.core.errors import ConfigError
from headtail.core.keys import query_key
from headtail.core.rows import TRAINING_SET, with_side_inputs
from headtail.core.spelling import SpellingIndex
from headtail.core.tagging import BEGIN, INSIDE, NONE, OUTSIDE, Scheme, Tags
from headtail.core.task import Task
from headtail.engines import ModelConfig, Request, open_engine
from headtail.engines.decisions import AnswerWriter, Decisions, decide_tags, head_slices, output_width
from headtail.engines.encoder import EncoderEngine, max_positions, word_logits
from headtail.engines.words import WordTokenizer
from headtail.stages.distill.base import Shape
from headtail.stages.distill.encoder import EncoderLearner, Settings, encoder_learner
from test_tagging import PLAIN, labelled

TINY = Shape(vocabulary=320, hidden=32, layers=2, heads=2, feed_forward=48, positions=64)
EXACT = ModelConfig(dtype="float32")  # in bfloat16 the last digit depends on a batch's width
QUERIES = [
    "pizza near me",
    "cheap sushi in berlin",
    "x",
    "how much is a very long massage in new york, please?",
    "東京 ramen",
    "pizza near me",
]


def training_table(rows: list[tuple[str, Any]], task: Task) -> pa.Table:
    schema = with_side_inputs(TRAINING_SET, task.side_inputs)
    sides: dict[str, list[str]] = {name: [] for name in task.side_inputs}
    plain = [
        {"query_key": query_key(q), "query": q, "answer": task.dump(a), "weight": 1.0, "stratum": "tail", "origin": "teacher", **sides}
        for q, a in rows
    ]
    return pa.Table.from_pylist([{**row, "answer_key": None} for row in plain], schema=schema)


def save(learner: EncoderLearner, folder: Path, task: Task, training_set: pa.Table) -> Path:
    model, tokenizer = learner.make(TINY, learner.texts(task, training_set), 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    learner.finish(folder)
    return folder


def random_encoder(folder: Path, task: Task) -> Path:
    """A random encoder for segmentation: it knows nothing, but all around it is real."""
    rows = [(q, {"segments": [{"text": q, "label": "topic"}]}) for q in dict.fromkeys(QUERIES)]
    training_set = training_table(rows, task)
    learner = encoder_learner([task], [training_set], io_format.IOFormat(side_inputs=True), Settings(pretrain_epochs=0))
    return save(learner, folder, task, training_set)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, segmentation: Task) -> Path:
    return random_encoder(tmp_path_factory.mktemp("encoder"), segmentation)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[EncoderEngine]:
    made = open_engine(EXACT, str(folder), None, {})
    assert isinstance(made, EncoderEngine)
    yield made
    made.close()


def asked(texts: list[str]) -> list[Request]:
    return [Request(i, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


def test_the_folder_says_which_engine_runs_it(folder: Path, teacher_path: Path) -> None:
    assert [io_format.read_format(path).kind for path in (folder, teacher_path, Path("org/model"))] == ["encoder", "decoder", "decoder"]


def test_each_row_gets_its_own_valid_answer(engine: EncoderEngine, segmentation: Task) -> None:
    found = {made.id: made for made in engine.generate(asked(QUERIES))}
    assert sorted(found) == list(range(len(QUERIES)))
    for number, made in found.items():
        answer, problem = segmentation.parse(made.text)
        assert not problem
        assert made.finish_reason == "stop"
        assert "".join(made.token_texts) == made.text
        assert made.text == segmentation.target(answer)  # as a decoder would write it
        spoken = tagging.word_spans(QUERIES[number])
        assert len(made.token_logprobs) == len(made.token_texts)
        assert made.tokens_out <= 2 * len(spoken)
        assert all(logprob <= 0 for logprob in made.token_logprobs)
        if answer["segments"]:
            sure = confidence(made.text, made.token_texts, made.token_logprobs)
            assert sure is not None
            assert 0 < sure <= 1
    assert found[0].text == found[5].text


@pytest.mark.parametrize("rows,tokens", [(1, 4096), (2, 4096), (256, 1), (3, 20)])
def test_an_answer_does_not_depend_on_its_neighbours(engine: EncoderEngine, folder: Path, rows: int, tokens: int) -> None:
    whole = {made.id: made for made in engine.generate(asked(QUERIES))}
    other = open_engine(EXACT.model_copy(update={"max_num_seqs": rows, "max_num_batched_tokens": tokens}), str(folder), None, {})
    for made in other.generate(asked(QUERIES)):
        assert made.text == whole[made.id].text
        np.testing.assert_allclose(made.token_logprobs, whole[made.id].token_logprobs, atol=1e-4)
    other.close()


def test_what_stands_beside_a_query_is_read_but_not_labelled(engine: EncoderEngine) -> None:
    alone, beside = engine.generate(asked(["pizza near me", "pizza near me\npizza palace; near you"]))
    assert beside.tokens_in > alone.tokens_in
    assert "palace" not in beside.text


def test_a_query_that_is_too_long_fails_alone(engine: EncoderEngine) -> None:
    found = {made.id: made for made in engine.generate(asked(["pizza", "a " * 80, "sushi"]))}
    assert "at most 64 fit" in found[1].error
    assert not found[0].error
    assert not found[2].error


def test_facts_say_what_is_in_force(engine: EncoderEngine) -> None:
    list(engine.generate(asked(QUERIES)))
    facts = engine.facts()
    assert (facts["engine"], facts["device"], facts["dtype"], facts["samples"]) == ("encoder", "cpu", "float32", 1)
    assert 0 < facts["real_token_share"] <= 1
    json.dumps(facts)


def test_a_folder_without_labels_or_of_another_schema_is_refused(folder: Path, intent: Task, teacher_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels\.json"):
        EncoderEngine(ModelConfig(), str(teacher_path), None, {})
    with pytest.raises(ConfigError, match="another answer schema"):
        EncoderEngine(ModelConfig(), str(folder), intent.schema, {})


def test_a_words_tokens_do_not_depend_on_its_neighbours(engine: EncoderEngine) -> None:
    reader: WordTokenizer = engine._reader
    together, alone = reader.read("cheap pizza, now"), [reader.read(word) for word in ("cheap", "pizza", ",", "now")]
    assert together.ids[1:-1] == [i for one in alone for i in one.ids[1:-1]]
    assert [together.ids[p] for p in together.places] == [one.ids[1] for one in alone]


def logits_for(scheme: Scheme, made: list[Tags], words: int, rng: np.random.Generator) -> np.ndarray:
    """Logits that say the labels of rows, with noise."""
    out = rng.normal(0, 0.1, (words, output_width(scheme)))
    parts = head_slices(scheme)
    at = 0
    for one in made:
        for kind, label, fix in zip(one.kinds, one.labels, one.fixes, strict=True):
            out[at, parts["kind"].start + kind] += 5
            out[at, parts["fix"].start + fix] += 5
            if label != NONE:
                out[at, parts["label"].start + label] += 5
            at += 1
    return out


def test_decisions_read_off_the_logits_give_the_answer() -> None:
    rows: list[tuple[str, dict[str, Any]]] = [
        ("piza near me", {"segments": [{"text": "pizza", "label": "a"}, {"text": "near me", "label": "b"}]}),
        ("icecrem", {"segments": [{"text": "ice cream", "label": 3}]}),
        ("the pizza x", {"segments": [{"text": "pizza", "label": "a"}]}),
    ]
    made = [tagging.encode_tags(PLAIN, query, answer) for query, answer in rows]
    assert all(one.exact for one in made)
    reads = [_read(query) for query, _ in rows]
    count = sum(len(found.places) for found in reads)
    logits = logits_for(PLAIN, made, count, np.random.default_rng(0))
    decided = decide_tags(PLAIN, SpellingIndex(PLAIN.corrections), [q for q, _ in rows], reads, logits)
    for (query, answer), found, one in zip(rows, reads, decided, strict=True):
        texts, logprobs, decisions = AnswerWriter(PLAIN).write(query, found.spoken, one)
        assert json.loads("".join(texts)) == answer
        assert decisions == len([k for k in one.kinds if k != OUTSIDE]) + len(answer["segments"])
        assert min(logprobs) > -0.5


def test_a_word_never_becomes_an_unlike_one() -> None:
    logits = np.zeros((1, output_width(PLAIN)))
    logits[0, head_slices(PLAIN)["kind"].start + BEGIN] = 9
    logits[0, head_slices(PLAIN)["fix"].start + tagging.FIRST_FIX] = 99  # the model is sure of "pizza"
    near = SpellingIndex(PLAIN.corrections)
    (found,) = decide_tags(PLAIN, near, ["sushi"], [_read("sushi")], logits)
    assert found.fixes == [tagging.KEEP]
    (found,) = decide_tags(PLAIN, near, ["pizzo"], [_read("pizzo")], logits)
    assert found.fixes == [tagging.FIRST_FIX]


def test_a_field_is_decided_by_all_words_of_its_query(intent: Task) -> None:
    scheme = tagging.scheme(intent.schema)
    logits = np.zeros((3, output_width(scheme)))
    logits[0, 1], logits[1, 2], logits[2, 3] = 3, 9, 1
    first, second = decide_tags(scheme, SpellingIndex(()), ["a b", "c"], [_read("a b"), _read("c")], logits)
    assert (first.values, second.values) == ([2], [3])
    assert AnswerWriter(scheme).write("c", [(0, 1)], second)[0] == ('{"intent": "', 'opening_hours"', "}")


def test_a_mark_inside_a_piece_is_left_out_where_that_is_known() -> None:
    scheme = PLAIN.model_copy(update={"corrections": ()})
    made = tagging.encode_tags(scheme, "st. louis", {"segments": [{"text": "st louis", "label": "a"}]})
    assert made.exact
    logits = logits_for(scheme, [made], 3, np.random.default_rng(0))
    (found,) = decide_tags(scheme, SpellingIndex(()), ["st. louis"], [_read("st. louis")], logits)
    assert found.fixes == [tagging.KEEP, tagging.DELETE, tagging.KEEP]


def test_a_pieces_label_is_decided_by_all_its_words() -> None:
    logits = np.zeros((4, output_width(PLAIN)))
    parts = head_slices(PLAIN)
    for at, (kind, label, much) in enumerate([(BEGIN, 0, 1), (INSIDE, 1, 3), (INSIDE, 1, 3), (INSIDE, 0, 9)]):
        logits[at, parts["kind"].start + kind] = 9
        logits[at, parts["label"].start + label] = much
    first, second = decide_tags(PLAIN, SpellingIndex([]), ["a b c", "d"], [_read("a b c"), _read("d")], logits)
    assert first.labels == [1, 1, 1]
    assert second.labels == [0]  # a row's first word begins a piece, whatever the row before ended in


@given(labelled())
def test_what_is_written_is_the_answer_of_the_labels(case: tuple[str, Tags]) -> None:
    query, made = case
    spoken = tagging.word_spans(query)
    zeros = [0.0] * len(spoken)
    row = _decided(made, zeros)
    texts, logprobs, _ = AnswerWriter(PLAIN).write(query, spoken, row)
    assert json.loads("".join(texts)) == tagging.decode_tags(PLAIN, query, made)
    assert len(texts) == len(logprobs)


def _decided(made: Tags, zeros: list[float]) -> Any:
    return Decisions(list(made.kinds), list(made.labels), list(made.fixes), [], zeros, zeros, [])


def _read(query: str) -> Any:
    from headtail.engines.words import WordTokens

    spoken = tagging.word_spans(query)
    return WordTokens([0] * (len(spoken) + 2), list(range(1, len(spoken) + 1)), len(spoken) + 2, spoken)


KINDS = ["Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "ModernBert"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_encoders_of_the_hub_give_what_their_own_forward_gives(kind: str, tmp_path: Path) -> None:
    """The short cut over the last layer, token types, positions: the same logits as transformers' own, also for a padded row."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
    if kind == "DistilBert":
        names = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 64}
    special = (
        {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2} if kind == "ModernBert" else {}
    )
    config = getattr(transformers, f"{kind}Config")(**names, **special, max_position_embeddings=64)
    base = getattr(transformers, f"{kind}Model")(config)
    base.save_pretrained(tmp_path)
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path, num_labels=output_width(PLAIN), ignore_mismatched_sizes=True
    ).eval()
    ids = torch.tensor([[3, 9, 8, 7, 4], [3, 9, 4, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    rows, places = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 1])
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask).logits
        found = word_logits(model, ids, {"attention_mask": mask}, rows, places)
        alone = model(input_ids=ids[1:, :3]).logits
    torch.testing.assert_close(found, whole[rows, places])
    torch.testing.assert_close(found[2], alone[0, 1], atol=1e-4, rtol=1e-4)
    assert max_positions(model) <= 64
