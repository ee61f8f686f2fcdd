"""`headtail release`: make a release, try it on a share of the queries, promote it, take it back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headtail.adapters.progress import answers, say
from headtail.cli.options import AsJson, ConfigFile, Root, Sets, root_of
from headtail.cli.override import Who, person_name
from headtail.core.errors import ConfigError

release_app = typer.Typer(name="release", no_args_is_help=True, help="Try a release on a share of the queries; promote; go back.")
Why = Annotated[str, typer.Option("--why", help="why, in words; kept with it")]


def _store(config: Any, sets: Any, root: Any) -> Any:
    from headtail.adapters.storage import open_existing

    return open_existing(root_of(config, sets, root))


@release_app.command("create")
def release_create(
    like: Annotated[str, typer.Option("--like", help="id of the release that it takes all else from, or `current`")] = "current",
    snapshot: Annotated[str, typer.Option("--snapshot", help="id of a snapshot, or of a release that has it; default: the same")] = "",
    student: Annotated[str, typer.Option("--student", help="distill/<fingerprint>, or `none`; default: the same")] = "",
    accept_unproven: Annotated[
        bool,
        typer.Option("--accept-unproven", help="accept that no gate passed its student although there are human labels; recorded in it"),
    ] = False,
    why: Why = "",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Make a release of another snapshot or student.

    Nothing is promoted. `headtail publish --set promote=false` makes one of new answers.
    """
    from headtail.adapters.storage.receipts import load_receipt
    from headtail.releases import release

    store = _store(config, sets, root)
    if not (snapshot or student or accept_unproven):
        raise ConfigError(
            "name what is new", where="headtail release create", fix="--snapshot ID, --student distill/<fingerprint>, or both"
        )
    chosen = None if not student else "" if student == "none" else load_receipt(store, "distill", student).path
    made = release.derive_release(store, like, snapshot=snapshot, student=chosen, note=why, accept_unproven=accept_unproven)
    say(f"release      {made.id}: snapshot {made.snapshot}, student {made.student or 'none'}")
    say(f"{'':<12} try it: headtail release canary 5% --release {made.id}")
    if as_json:
        print(made.model_dump_json(exclude={"task_copy"}))


@release_app.command("canary")
def release_canary(
    share: Annotated[str, typer.Argument(help="share of the queries that it answers, such as 5%; 0% ends the canary", metavar="SHARE")],
    release: Annotated[
        str, typer.Option("--release", help="id of the release; default: the canary that runs, else what the last publish made")
    ] = "",
    min_queries: Annotated[int | None, typer.Option("--min-queries", help="queries it must answer before a decision", min=1)] = None,
    slow_ms: Annotated[float | None, typer.Option("--slow-ms", help="an answer that takes longer, in ms, counts as slow")] = None,
    judged: Annotated[bool | None, typer.Option("--judged/--not-judged", help="whether quality must be proven too")] = None,
    who: Who = "",
    why: Why = "",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Let a release answer a share of the queries.

    A query always meets the same release. Servers follow within seconds. The canary is taken back when it is proven worse.
    """
    from headtail.releases import canary

    store, part, name = _store(config, sets, root), parse_share(share), person_name(who)
    if part == 0:
        record = canary.stop_canary(store, who=name, why=why)
        say(f"canary       of release {record.canary} ended; {record.champion} answers all queries")
    else:
        running = canary.read_canary(store)
        base = running.policy if running is not None and canary.is_running(store, running) else canary.CanaryPolicy()
        given = {"min_queries": min_queries, "slow_ms": slow_ms, "judged": judged}
        policy = base.model_copy(update={field: value for field, value in given.items() if value is not None})
        chosen = release or (running.canary if running is not None and canary.is_running(store, running) else _published(store))
        record = canary.start_canary(store, chosen, part, who=name, why=why, policy=policy)
        say(f"canary       release {record.canary} answers {record.share:.3g} of the queries, {record.champion} the others")
        say(f"{'':<12} {_promise(record)}")
    if as_json:
        print(record.model_dump_json())


@release_app.command("promote")
def release_promote(
    release: Annotated[str, typer.Argument(help="id of a release; default: the canary that runs")] = "",
    accept_undecided: Annotated[
        bool, typer.Option("--accept-undecided", help="promote the canary although it is not proven that it does no harm")
    ] = False,
    who: Who = "",
    config: ConfigFile = None,
    sets: Sets = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Make the canary, or a release by its id, the current one.

    Refused (exit code 1) when what its gates found does not hold computed anew; without an id, unless the canary is proven to do no harm.
    """
    from headtail.releases import canary
    from headtail.releases.promotion import promote_release
    from headtail.releases.release import load_release

    store = _store(config, sets, root)
    if release:
        now = promote_release(store, release)
    else:
        now = load_release(store, canary.promote_canary(store, who=person_name(who), accept_undecided=accept_undecided).canary)
    say(f"current release: {now.id} (snapshot {now.snapshot})")
    if as_json:
        print(now.model_dump_json(exclude={"task_copy"}))


@release_app.command("rollback")
def release_rollback(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Make the previous release current: cache and student together.

    A canary that runs is over: it was compared with another release.
    """
    from headtail.cli.store import rollback

    rollback(config, sets, root, as_json)


@release_app.command("status")
def release_status(config: ConfigFile = None, sets: Sets = None, root: Root = None, as_json: AsJson = False) -> None:
    """Show the current release, the canary, and what is proven about it."""
    from headtail.releases.release import load_release
    from headtail.releases.standing import read_standing

    store = _store(config, sets, root)
    standing = read_standing(store)
    if as_json:
        print(standing.model_dump_json())
        return
    current, record, verdict, running = load_release(store, standing.current), standing.canary, standing.verdict, standing.running
    answers.print(f"current      {current.id}  snapshot {current.snapshot}  student {current.student or 'none'}  {current.created}")
    if record is None or verdict is None:
        answers.print("canary       none was ever begun")
        return
    state = "running" if running else "over: its champion is not current any more" if record.state == "running" else record.state
    answers.print(f"canary       {record.canary}  {state}  share {record.share:.3g}  since {record.started}  {record.why}")
    compared = f"{record.queries[0]:,} queries of {record.champion}, {record.queries[1]:,} of {record.canary}"
    answers.print(f"compared     {compared}, as of {record.at}: servers add theirs every 5 minutes, and at once when it is proven worse")
    answers.print(f"verdict      {verdict.word}{': the share is held' if running and verdict.word == 'undecided' else ''}")
    for reason in verdict.reasons:
        answers.print(f"{'':<12} {reason}")
    if running:
        answers.print(f"{'':<12} {_promise(record)}")


def parse_share(text: str) -> float:
    """`5%` or `0.05` as 0.05. ConfigError when it is no share below 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError("not a share below 100 %", where="SHARE", value=text, fix="for example 5%, 0.5% or 0.05; 0% ends the canary")
    return value


def _promise(record: Any) -> str:
    """How many of the canary's queries it takes to catch a regression."""
    from headtail.core.sequential import pairs_to_catch

    margins, block = record.policy.margins, max(1, round(1 / record.share - 1))
    found = [(rate, pairs_to_catch(rate, margins.harm, margins, block)) for rate in (0.01, 0.05, 0.5)]
    parts = ", ".join(f"{pairs:,} where {rate:.0%} is usual" for rate, pairs in found if pairs is not None)
    return f"queries of the canary that catch {margins.harm:.0%} more of a bad outcome, with 95 % chance: {parts}"


def _published(store: Any) -> str:
    from headtail.adapters.storage.receipts import load_receipt
    from headtail.stages.publish import Result

    return str(load_receipt(store, "publish", "latest", Result).result.release)
