"""Tokenizers for models with random weights: byte-level BPE, with a minimal chat template or for the words of queries.

In: texts to learn from. Out: a Hugging Face tokenizer. Byte-level, so any text can be written. For models that write, chunks are
runs of letters, of digits, or of anything else, so that the glue of JSON (`", "label": "`) becomes few tokens; for encoders a
chunk is a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from headtail.core.tagging import word_spans

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
WORD_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A PreTrainedTokenizerFast of at most `vocabulary` tokens learnt from `texts`."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chunks = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+?(?= ?\p{L}|\p{N}|$)"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(texts, vocabulary, chunks, SPECIAL),
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_word_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer whose words begin with a marked blank, so that a word's tokens are the same wherever it stands."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chunks = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    spoken = (text[a:b] for text in texts for a, b in word_spans(text))
    pad, unknown, start, end, mask = WORD_SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(spoken, vocabulary, chunks, WORD_SPECIAL),
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )


def _byte_bpe(texts: Iterable[str], vocabulary: int, chunks: Any, special: tuple[str, ...]) -> Any:
    """A tokenizers.Tokenizer of at most `vocabulary` tokens, none across two of the `chunks` that texts are first cut into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = chunks, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
