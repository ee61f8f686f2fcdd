"""A simulation in sentences: each design in one, and whether a student is needed.

In: figures of the designs. Out: text. Decides nothing but what it says. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headtail.stages.simulate.result import DesignFigures, QualityFigures


def design_words(design: DesignFigures) -> str:
    """One design in one line."""
    ways = ", ".join(f"{name} {way.share:.1%}" for name, way in design.ways.items())
    parts = [f"p50 {design.latency.p50_ms:,.3g} ms, p99 {design.latency.p99_ms:,.3g} ms", ways, quality_words(design.quality)]
    if design.cost.total is not None:
        parts.append(f"USD {design.cost.total:,.3g} per million requests")
    need = design.needed
    fronts = f"fronts {need.fronts}"
    if need.students is not None:
        parts.append(f"for the target: {fronts}, students {need.students}")
    else:
        parts.append(f"the target is not met by {fronts}" + (" and any number of students that was tried" if design.students else ""))
    return f"{design.name}: {'; '.join(parts)}"


def quality_words(quality: QualityFigures) -> str:
    """Micro-F1 with its interval."""
    if quality.value is None:
        return f"quality not known ({quality.unknown})"
    return f"F1 {quality.value:.3f} ({quality.low:.3f} to {quality.high:.3f})"


def doubt_words(designs: Sequence[DesignFigures], late_share: float) -> str:
    """Why nothing can be said of the need for a student; empty: something can."""
    if not any(one.students for one in designs):
        return "no design has a student; set `students` of one to at least 1"
    for one in designs:
        if one.quality.value is None:
            return f"the quality of {one.name} is not ({one.quality.unknown})"
        if one.late_share > late_share:
            need = one.needed
            more = f"set its fronts={need.fronts}, students={need.students}" if need.students else "leave it out of designs"
            return (
                f"{one.name} is overloaded: {one.late_share:.1%} of its requests get the fallback for that (target.late_share is "
                f"{late_share:.1%}), so its quality is not that of its students; {more}, or set traffic.rate_per_s lower"
            )
    return ""


def need_words(designs: Sequence[DesignFigures], good: Sequence[DesignFigures], best: str, margin: float) -> Iterator[str]:
    """Whether the heuristic is enough, and which design costs least of the good ones: as good as the best, and meeting the target."""
    for design in designs:
        quality = design.quality
        if design.students or quality.against_best is None or quality.against_best_low is None:
            continue
        gap = f"F1 {abs(quality.against_best):.3f} below {best} (at most {abs(quality.against_best_low):.3f})"
        gap = "no design is better" if design.name == best else gap
        if design in good:
            yield f"no student is needed: {design.name} is enough, {gap}"
        elif quality.against_best_low >= -margin:
            yield f"{design.name} does not meet the target, else no student was needed: {gap}"
        else:
            yield f"{design.name} is not shown to be enough: {gap}, where {margin:g} may be lost"
    priced = [one for one in good if one.needed.usd_per_million is not None]
    if priced:
        least = min(priced, key=lambda one: one.needed.usd_per_million or 0.0)
        usd = f"USD {least.needed.usd_per_million:,.3g} per million requests"
        yield f"{least.name} costs least of the designs within {margin:g} of the best that meet the target: {usd}"
