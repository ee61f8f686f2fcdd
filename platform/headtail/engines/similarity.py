"""How alike two texts are in meaning: the cosine of their embeddings by a local encoder folder.

In: a folder with a BERT-type encoder and its tokenizer. Out: a function of two texts, 0 to 1. Embeddings are the mean over tokens, as
sentence encoders are trained; texts met before are not encoded again. On CPU: labelled rows are few. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from headtail.engines.device import quiet_transformers

_KEPT = 20_000  # embeddings in memory: some 30 MB
_LONGEST = 256  # tokens of a text


def encoder_similarity(folder: str) -> Callable[[str, str], float]:
    """The similarity by the encoder in `folder`. A negative cosine is 0."""
    quiet_transformers()
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()

    @lru_cache(maxsize=_KEPT)
    def embed(text: str) -> Any:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=_LONGEST)
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state[0].mean(0)
        return hidden / hidden.norm().clamp(min=1e-12)

    def similarity(one: str, other: str) -> float:
        return 1.0 if one == other else min(1.0, max(0.0, float(embed(one) @ embed(other))))

    return similarity
