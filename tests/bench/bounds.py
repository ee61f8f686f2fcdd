"""What a proof costs in labels, and whether `labels needed` is true, in full: the quick form is in tests/test_bounds.py and test_paired.py.

In: nothing but seeds. Out: figures by name, and tables as they come. The cases: a student that differs from its teacher on one row in
ten and may fall by 0.05; spans of which long queries are answered worse; thresholds near and far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from headtail.core.bounds import Array, Game, Share, share_p
from headtail.core.paired import PairedShare
from headtail.stages.curate import curve
from headtail.stages.precompute.dry_run.estimate import moments, predict

SHARE, DROP, LEVEL, POWER = 0.1, 0.05, 0.05, 0.8
_LEAST = (1 - DROP) / 2
_GAMES = 4000


def paired_passes(n: int, share: float = SHARE, level: float = LEVEL, games: int = _GAMES) -> tuple[float, float]:
    """How often the exact test and betting show a drop of at most DROP on n rows, of an equal student that differs on `share` of them."""
    rng, chances = np.random.default_rng(n), [share / 2, share / 2, 1 - share]
    drawn = rng.choice(np.array([1.0, 0.0, 0.5]), (games, n), p=chances)
    pairs, counts = np.unique(np.column_stack([(drawn == 1).sum(1), (drawn == 0).sum(1)]), axis=0, return_counts=True)
    ps = np.array([PairedShare(x, y, n).p(_LEAST) for x, y in pairs.tolist()])
    return float(counts[ps <= level].sum() / games), float((Game(drawn, level).ps(_LEAST) <= level).mean())


def needed_by(passes: Callable[[int], float], low: int, high: int) -> int:
    """The fewest rows at which `passes` reaches POWER, by halving: to the noise of the games."""
    while high - low > max(2, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) >= POWER else (middle, high)
    return high


def paired_labels_needed() -> dict[str, float]:
    """Labels for the same proof: the exact test, betting, and what the gate would say."""
    figures: dict[str, float] = {}
    for share in (0.08, SHARE, 0.12):
        exact = needed_by(lambda n, share=share: paired_passes(n, share)[0], 100, 900)  # type: ignore[misc]
        betting = needed_by(lambda n, share=share: paired_passes(n, share)[1], 100, 900)  # type: ignore[misc]
        said = PairedShare(round(share * 50_000), round(share * 50_000), 100_000).rows_needed(_LEAST, LEVEL, POWER)
        print(f"differs on {share:.0%} of rows: exact {exact}, betting {betting}, the gate says {said}", flush=True)
        if share == SHARE:
            figures = {"paired_labels_needed": exact, "paired_labels_needed_by_betting": betting, "paired_labels_said": float(said or 0)}
    return figures


def spans(rng: np.random.Generator, rows: int, right: float, most: int = 8) -> tuple[Array, Array]:
    """Rows' own F1 and units (over 2 x most) of queries of 1 to 4 spans: long ones are answered worse; one in eight has a span more."""
    wanted = rng.choice([1, 2, 3, 4], size=rows, p=[0.35, 0.35, 0.2, 0.1])
    hits = rng.binomial(wanted, np.clip(right - 0.02 * (wanted - 2), 0, 1))
    units = 2 * wanted + (rng.random(rows) < 0.125)
    return np.asarray(2 * hits / units), np.asarray(units / (2 * most), np.float64)


def micro_f1_power() -> dict[str, float]:
    """Micro-F1 by betting on its units, beside the mean of rows' own F1 by betting on rows, 400 labels, for the threshold 0.03 below."""
    rng = np.random.default_rng(0)
    scores, units = spans(rng, 200_000, 0.93)
    micro, mean = float((scores * units).sum() / units.sum()), float(scores.mean())
    figures: dict[str, float] = {}
    for most in (4, 8):
        drawn = rng.integers(0, len(scores), (_GAMES, 400))
        by_units = Game(scores[drawn], LEVEL, weights=units[drawn] * 8 / most).ps(micro - 0.03) <= LEVEL
        false = Game(scores[drawn], LEVEL, weights=units[drawn] * 8 / most).ps(micro) <= LEVEL
        figures |= {f"micro_f1_power_maxitems_{most}": float(by_units.mean()), f"micro_f1_false_pass_maxitems_{most}": float(false.mean())}
    figures["row_f1_power"] = float((Game(scores[drawn], LEVEL).ps(mean - 0.03) <= LEVEL).mean())
    print(f"micro-F1 {micro:.3f}, rows' mean F1 {mean:.3f}, 400 labels, threshold 0.03 below: {figures}", flush=True)
    return figures


def labels_needed_error() -> dict[str, float]:
    """`labels needed` beside the labels that simulated gates need, where the truth is known: the largest relative error."""
    rng, worst = np.random.default_rng(0), 0.0
    for truth, least, level in ((0.9, 0.85, 0.05), (0.93, 0.9, 0.0125), (0.95, 0.9, 0.001), (0.98, 0.95, 0.01)):
        said = Share(round(truth * 10_000), 10_000).rows_needed(least, level, POWER) or 0
        found = needed_by(lambda n, t=truth, m=least, a=level: share_power(n, t, m, a), said // 2, 2 * said)  # type: ignore[misc]
        worst = max(worst, abs(said / found - 1))
        print(f"right rows: truth {truth}, threshold {least}, level {level}: says {said}, needs {found}", flush=True)
    for right, gap, level in ((0.93, 0.05, 0.05), (0.95, 0.03, 0.0125), (0.9, 0.03, 0.05), (0.95, 0.04, 0.001)):
        for weighted in (False, True):
            scores, units = spans(rng, 20_000, right)
            weights = units if weighted else None
            least = float(np.average(scores, weights=weights)) - gap
            said = Game(scores, level, weights=weights).rows_needed(least, level, POWER) or 0
            found = needed_by(lambda n, s=scores, w=weights, m=least, a=level: game_power(s, w, n, m, a), said // 2, 2 * said)  # type: ignore[misc]
            worst = max(worst, abs(said / found - 1))
            print(f"{'micro-F1' if weighted else 'F1'}: {gap} above, level {level}: says {said}, needs {found}", flush=True)
    return {"labels_needed_largest_error": worst}


def share_power(n: int, truth: float, least: float, level: float) -> float:
    """How often n rows show `least`, in 20,000 gates."""
    right = np.random.default_rng(n).binomial(n, truth, 20_000)
    return float((share_p(right, n, least) <= level).mean())


def game_power(scores: Array, weights: Array | None, n: int, least: float, level: float) -> float:
    """How often a game of n of the rows shows `least`, in up to 2,000 games."""
    drawn = np.random.default_rng(n).integers(0, len(scores), (min(2000, 4_000_000 // n), n))
    game = Game(scores[drawn], level, weights=None if weights is None else weights[drawn])
    return float((game.ps(least) <= level).mean())


def skewed_cover(sigma: float, seen: int, left: int, runs: int, skewed: bool = True) -> float:
    """How often a dry run's bounds of a sum of lognormal token lengths hold it; without `skewed` a t-interval's."""
    rng, held = np.random.default_rng(seen + left), 0
    many = left > 20_000  # then their sum is normal
    mean, sd = np.exp(sigma**2 / 2), np.exp(sigma**2 / 2) * np.sqrt(np.exp(sigma**2) - 1)
    for _ in range(runs):
        found = moments(rng.lognormal(0, sigma, seen))
        total = rng.normal(left * mean, np.sqrt(left) * sd) if many else rng.lognormal(0, sigma, left).sum()
        span = predict(found if skewed else found.model_copy(update={"skew": 0.0}), seen, left)
        held += span.low <= total <= span.high
    return held / runs


def token_bounds_cover() -> dict[str, float]:
    """The cover of a dry run's bounds of tokens, nominal 0.95, over skewed lengths: the least, beside that of a t-interval."""
    cells = [(sigma, seen, left) for sigma in (0.5, 1.0, 1.5) for seen in (100, 300, 1000) for left in (500, 100_000)]
    found = {cell: (skewed_cover(*cell, 4000), skewed_cover(*cell, 4000, skewed=False)) for cell in cells}
    for (sigma, seen, left), (ours, t) in found.items():
        print(f"sigma {sigma}, {seen} rows of a probe, {left:,} left: {ours:.3f}, t-interval {t:.3f}", flush=True)
    least = {"token_bounds_cover_min": min(ours for ours, _ in found.values()), "token_t_cover_min": min(t for _, t in found.values())}
    print(least, flush=True)
    return least


LAWS = ((2.0, 0.5, 0.03), (0.8, 0.3, 0.05), (5.0, 0.7, 0.02), (1.2, 0.4, 0.0))  # error = a rows^-b + c
LABELS = (3000, 12_000)  # that a point's error is counted on


def enough_cover(law: tuple[float, float, float], tested: int, curves: int, min_gain: float = 0.002, seed: int = 0) -> tuple[float, float]:
    """How often the 80 % interval of the size that is enough holds the true one, and how far apart its ends are (median of their ratio).

    The points of a curve are the law's errors at 125, 250, ... 8,000 rows, each counted on `tested` labels.
    """
    a, b, c = law
    true = (a * (1 - 2**-b) / min_gain) ** (1 / b)
    rng, held, ratios = np.random.default_rng([seed, tested, int(100 * b)]), 0, []
    for number in range(curves):
        points = []
        for rows in 125 * 2 ** np.arange(7):
            error = rng.binomial(tested, min(a * rows**-b + c, 1.0)) / tested
            points.append(curve.Point(int(rows), float(error), float(np.sqrt(error * (1 - error) / tested))))
        found = curve.fit(points, min_gain, seed=number)
        if found is not None:
            held += found.enough_low <= true <= found.enough_high
            ratios.append(found.enough_high / max(found.enough_low, 1))
    return held / curves, float(np.median(ratios))


def all_enough_covers(curves: int = 300) -> dict[str, float]:
    """All laws and numbers of labels: the least and the highest cover, nominal 0.80."""
    covers = []
    for law in LAWS:
        for tested in LABELS:
            cover, ratio = enough_cover(law, tested, curves)
            print(
                f"error = {law[0]} rows^-{law[1]} + {law[2]}, {tested:,} labels: holds {cover:.3f}, ends {ratio:,.1f} times apart",
                flush=True,
            )
            covers.append(cover)
    return {"enough_cover_min": min(covers), "enough_cover_max": max(covers)}


SIMULATIONS: dict[str, Callable[[], Mapping[str, float]]] = {
    "enough_rows": all_enough_covers,
    "paired_labels_needed": paired_labels_needed,
    "micro_f1_power": micro_f1_power,
    "labels_needed_error": labels_needed_error,
    "token_bounds_cover": token_bounds_cover,
}
