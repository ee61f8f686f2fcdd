"""Text to token ids: only the chat template makes control tokens, and text that a user typed stays text.

In: a Hugging Face tokenizer; texts, words or chats. Out: their ids, the same that the tokenizer gives for text without control tokens.
A tokenizer turns `<|im_end|>` into one id wherever it stands, so a query could end its own turn. Here a copy of the tokenizer has its
control tokens under names that nobody can guess. The template's own control tokens get those names; all others are spelt out like any text.
Control tokens are the tokens marked special, and those that the template writes. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from headtail.core.errors import ConfigError
from headtail.core.io_format import merge_system_message

Chat = Sequence[dict[str, str]]
VERSION = 1  # raise it when the same text becomes other ids


class Encoder:
    """A tokenizer for text that people write. `control`: the ids that no text can become."""

    def __init__(self, tokenizer: Any, system_role: str = "keep") -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            fix = "use a model folder with a tokenizer.json"
            raise ConfigError("this tokenizer cannot keep typed control tokens apart", where=str(tokenizer.name_or_path), fix=fix)
        self._tokenizer, self._merges, self._checked = tokenizer, system_role == "merge", False
        plain = json.loads(backend.to_str())
        tokens = _control(plain["added_tokens"], getattr(tokenizer, "chat_template", None) or "")
        self.control = frozenset(tokens.values())
        mark = secrets.token_hex(8)
        inside = {token: f"{mark}i{number:06}" for number, token in enumerate(tokens)}  # what only the copy takes for a control token
        typed = {token: f"{mark}o{number:06}" for number, token in enumerate(tokens)}  # stands for one that a person typed
        rendered = inside | {name: token for token, name in typed.items()}
        self._hide, self._show = _replacer(typed), _replacer(rendered)
        self._copy = Tokenizer.from_str(json.dumps(_rename_tokens(plain, inside)))
        self._copy.no_padding()
        self._copy.no_truncation()

    def texts(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of texts, without tokens that begin or end a sequence."""
        return [found.ids for found in self._copy.encode_batch(list(texts), add_special_tokens=False)]

    def words(self, words: Iterable[str]) -> list[list[int]]:
        """The ids of words, each as it is split in a text that is cut into words."""
        asked = [[word] for word in words]
        return [found.ids for found in self._copy.encode_batch(asked, is_pretokenized=True, add_special_tokens=False)]

    def chats(self, chats: Iterable[Chat]) -> list[list[int]]:
        """The ids of chats as the model's template renders them, ready for an answer.

        ConfigError when the template refuses or leaves out a system message and `system_role` keeps it.
        """
        if not self._tokenizer.chat_template:
            fix = (
                "use an instruction-tuned model, add chat_template.jinja to its folder, or, to train it, set io_format.prompt to query_only"
            )
            raise ConfigError("the model's tokenizer has no chat template", where=str(self._tokenizer.name_or_path), fix=fix)
        chats = [merge_system_message(chat) for chat in chats] if self._merges else list(chats)
        if not self._checked and any(message.get("role") == "system" for chat in chats for message in chat):
            self._check_system()
        asked = [[{**message, "content": self._hide(message["content"])} for message in chat] for chat in chats]
        prompts = self._tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) if asked else []
        return self.texts(map(self._show, prompts))

    def _check_system(self) -> None:
        """One probe per tokenizer: a system message that is not in the prompt would be missing from every row."""
        mark, user = secrets.token_hex(8), {"role": "user", "content": "x"}
        try:
            found, said = mark in self._render([{"role": "system", "content": mark}, user]), "leaves out"
        except Exception as error:  # whatever a template raises
            found, said = False, f"refuses ({error})"
        if not found:
            self._render([user])  # a template that cannot even do this has another fault
            fix = "set model.system_role to merge (of a student that is trained: io_format.system_role)"
            where = f"model.system_role; {self._tokenizer.name_or_path}"
            raise ConfigError(f"the model's chat template {said} a system message", where=where, value="keep", fix=fix)
        self._checked = True

    def _render(self, chat: Chat) -> str:
        return str(self._tokenizer.apply_chat_template([dict(message) for message in chat], add_generation_prompt=True, tokenize=False))


def _control(added: Iterable[Mapping[str, Any]], template: str | Mapping[str, str]) -> dict[str, int]:
    """The control tokens among those `added` to a vocabulary, with their ids."""
    written = template if isinstance(template, str) else "".join(template.values())
    return {
        token["content"]: token["id"]
        for token in added
        if token["special"] or (token["content"] in written and token["content"].strip() and not token["content"].isalnum())
    }


def _replacer(names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that gives each of `names` in a text its other name, the longest first, as tokenizers find them."""
    pattern = re.compile(_any_of(names) or "(?!)")
    return lambda text: pattern.sub(lambda found: names[found[0]], text)


def _any_of(words: Iterable[str]) -> str:
    """A pattern for the longest of `words`, letter by letter: Gemma has 6,249 control tokens, and side by side they took 1 ms a row."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[:1], []).append(word[1:])
    ends = tails.pop("", None) is not None
    branches = "|".join(re.escape(letter) + _any_of(rest) for letter, rest in tails.items())
    return f"(?:{branches})" + ("?" if ends else "") if branches else ""


def _rename_tokens(plain: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which tokens have other `names` and the same ids, and no text can be put together to one of them."""
    for token in plain["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = plain["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if "merges" in model:
        pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a not in names and b not in names and a + b not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return plain
