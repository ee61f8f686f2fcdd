"""The chance with which each label of the example data was drawn, so that the labels say their design truly.

In: a Config and its labels. Out: a chance for each. Knows nothing of answers.
"""

from __future__ import annotations

import math
from collections import defaultdict

from headtail.examples.example_data import LABELS_SALT, ONCE, VARIANTS, Config, Meaning, label_tries, meaning, misspell


def label_chances(config: Config, labels: list[tuple[str, Meaning, bool]], salt: str = LABELS_SALT) -> list[float]:
    """The chance of each label's query to be in the draw of `sample`: 1 - (1 - q)^tries, where one try finds it with chance q.

    Of a query that another meaning's misspelling gives too, that chance is left out.
    """
    left, tries = {text for text, _, _ in labels}, 0
    for text, _, _ in label_tries(config, salt) if left else ():
        left.discard(text)
        tries += 1
        if not left:
            break
    bases = {found.text for _, found, _ in labels}
    chance: dict[str, float] = defaultdict(float)
    for rank in range(config.universe - 1):
        if (text := meaning(config.seed, rank, config.universe).text) in bases:
            chance[text] += (1 - ONCE) * math.log((rank + 2) / (rank + 1)) / math.log(config.universe)
    last_new = config.universe + int(config.events * config.unseen_share)
    fresh = range(max(config.universe, last_new - max(1, (last_new - config.universe) // config.days)), max(config.universe + 1, last_new))
    for rank in fresh:
        if (text := meaning(config.seed, rank, config.universe).text) in bases:
            chance[text] += ONCE / len(fresh)
    slips = 2 * config.typo_share
    found_chances = []
    for text, found, _ in labels:
        spelt = sum(slips / (VARIANTS - 1) for variant in range(1, VARIANTS) if misspell(found.text, variant) == text)
        q = chance[found.text] * (spelt + (1 - slips) * (text == found.text))
        found_chances.append(-math.expm1(tries * math.log1p(-min(q, 1 - 1e-12))))
    return found_chances
