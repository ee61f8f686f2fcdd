"""The rows: every table that passes between stages, as Arrow schemas, in the order of the data flow.

    event -> query -> (head | torso | tail) -> answer -> training row
                \\-> holdout (traffic after the cut)        human labels (people's answers, never trained on)

A task's side inputs are further columns of type list<string> at the end of query, holdout and tables of human labels: `with_side_inputs`.
Knows nothing of where tables are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headtail.core.errors import ConfigError, InputError
from headtail.core.keys import KEY_BYTES

KEY = pa.binary(KEY_BYTES)
SIDE_INPUT = pa.list_(pa.string())


class State(StrEnum):
    """How a row's generation ended. Every row that goes in ends in exactly one of these."""

    ANSWERED = "answered"  # complete, valid under the task's schema
    TRUNCATED = "truncated"  # the engine stopped at its length limit (finish_reason=length)
    INVALID = "invalid"  # complete, but not JSON or not valid under the schema
    REFUSED = "refused"  # the model or its provider declined
    FAILED = "failed"  # the engine raised, timed out or answered with an error


class Stratum(StrEnum):
    """Where a query stands in the traffic. Quality is always shown by stratum: an average hides the tail."""

    HEAD = "head"  # answered ahead of time by the teacher
    TORSO = "torso"  # seen more than once, outside the head
    TAIL = "tail"  # seen once
    UNSEEN = "unseen"  # not in the log up to the cut; appears in holdout traffic


STRATA = tuple(str(stratum) for stratum in Stratum)
ALL, TRAFFIC = "all", "traffic"  # every labelled row alike; the traffic, post-stratified
SLICES = (*STRATA, ALL, TRAFFIC)  # what quality is shown by
SMALL = 30  # labelled rows below which a note says that a figure rests on few


class Source(StrEnum):
    """The answer source: who answered a request."""

    TEACHER = "teacher"
    BATCH_STUDENT = "batch_student"
    REALTIME_STUDENT = "realtime_student"
    FALLBACK = "fallback"
    DYNAMIC = "dynamic"  # the realtime student's, given again
    HUMAN_OVERRIDE = "human_override"  # a person's answer, which outranks all
    ESCALATED = (
        "escalated"  # a bigger model's, where the realtime student was unsure; add at the end alone: snapshots hold a source by its place
    )


# One aggregated query. `query` is normalised, `query_key` its hash; `count` events up to the cut.
QUERY = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("count", pa.int64()),
        ("first_day", pa.date32()),  # null when the log has no timestamps
        ("last_day", pa.date32()),
    ]
)

# A QUERY with its place in the plan. `rank` 1 is the most frequent; `eval_only` rows are labelled queries: never trained on.
PLANNED = pa.schema([*QUERY, ("rank", pa.int64()), ("stratum", pa.string()), ("eval_only", pa.bool_())])

# Holdout: traffic after the cut, aggregated: what the release will meet. `seen`: was in the log before the cut.
HOLDOUT = pa.schema([("query_key", KEY), ("query", pa.string()), ("count", pa.int64()), ("seen", pa.bool_())])

# What came, on a later day, of the queries that were alike at the end of an origin day. Alike: about as many events up to the origin
# (`count_class`), about as many days of the log since the last one (`idle_class`), both redacted or not. A row with day = origin has
# the queries of the cell and their events up to then; a row of a later day those of them that came, and their events. Class 0: queries
# that had not come up to the origin. Numbers are fractions where light queries are sampled by weight.
HISTORY = pa.schema(
    [
        ("origin", pa.date32()),
        ("day", pa.date32()),
        ("count_class", pa.int32()),
        ("idle_class", pa.int32()),
        ("redacted", pa.bool_()),
        ("queries", pa.float64()),
        ("events", pa.float64()),
    ]
)

# A row of the log that was not used, and why.
SET_ASIDE = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())])

# A person's answer to a query, canonical JSON in `answer`, and how the query was drawn (label_design.py).
DESIGN = pa.schema([("design", pa.string()), ("inclusion", pa.float64())])  # inclusion: the chance of being drawn; null: not said
HUMAN_LABELS = pa.schema(
    [("query_key", KEY), ("query", pa.string()), ("answer", pa.string()), ("count", pa.int64()), ("stratum", pa.string()), *DESIGN]
)

# One of n samples of a row, beside the others.
SAMPLE = pa.struct(
    [
        ("answer", pa.string()),  # canonical JSON, only when state is answered
        ("state", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens_out", pa.int32()),
        ("confidence", pa.float32()),
    ]
)

# What an engine made of one row. `answer`: canonical JSON, only when state is answered; `raw`: the engine's text otherwise.
ANSWER = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer_key", KEY),
        ("state", pa.string()),
        ("answer", pa.string()),
        ("confidence", pa.float32()),  # 0..1, over decision tokens only; null when the engine gives no log-probs
        ("finish_reason", pa.string()),
        ("tokens_in", pa.int32()),
        ("tokens_out", pa.int32()),
        ("reason", pa.string()),  # why a row is not answered
        ("raw", pa.string()),
        ("count", pa.int64()),  # carried from the input
        ("stratum", pa.string()),
        ("eval_only", pa.bool_()),
        ("source", pa.string()),  # teacher | batch_student | realtime_student | human_override
        ("model", pa.string()),
        ("seconds", pa.float32()),  # engine time that went into this row, whenever it was made; their sum is the engine's
        ("agreement", pa.float32()),  # share of n samples that gave this answer; null when one was drawn
        ("samples", pa.list_(SAMPLE)),  # every sample when n > 1, else null
        ("logprobs", pa.list_(pa.float32())),  # natural log, one per output token of the answer; null when not kept
        ("runs", pa.int16()),  # in how many runs it was asked and ended in this state, for a reason that asking again seldom removes
    ]
)

# Beside an ANSWER, and the TRAINING_SET row made from it, where a job was asked for top_logprobs: the answer's own tokens (its end
# included), and at each of them the k likeliest, likeliest first. Null where a row is not answered, or is no longer the model's words.
TOP = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),  # n
        ("top_ids", pa.list_(pa.int32())),  # n x k, flat
        ("top_logprobs", pa.list_(pa.float16())),  # n x k, flat; natural log, after the grammar's mask
    ]
)

# One training row: the query as the teacher saw it, the answer to learn, and where it came from.
TRAINING_SET = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer", pa.string()),
        ("weight", pa.float32()),
        ("stratum", pa.string()),
        ("origin", pa.string()),  # teacher | human
        ("answer_key", KEY),  # provenance: the teacher's answer this row was made from; null where a person wrote the answer
    ]
)

# A row that curation left out, and why.
DROPPED = pa.schema([("query_key", KEY), ("query", pa.string()), ("reason", pa.string()), ("confidence", pa.float32())])

# An answer that may be wrong, in order of what looking at it is expected to gain. `gain`: score times events.
SUSPECT = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer", pa.string()),  # canonical JSON; null when the row is not answered
        ("answer_key", KEY),
        ("stratum", pa.string()),
        ("count", pa.int64()),
        ("score", pa.float32()),  # 0..1: how likely the answer is wrong
        ("gain", pa.float64()),
        ("reasons", pa.list_(pa.string())),  # signals that speak against it, strongest first
        ("alternatives", pa.list_(pa.string())),  # other answers that a sample, a neighbour or a student gave; canonical JSON
        ("confidence", pa.float32()),
        ("agreement", pa.float32()),
        ("place", pa.int64()),  # in the queue, from 0; null: the queue is by falling gain
        ("evidence", pa.float64()),  # log odds against the answer, which its score is made from; null: no answer
        ("drawn_from", pa.int64()),  # open answers that this one was drawn from at random; null: it was chosen for its gain
    ]
)

# What a person decided about one answer. `verdict`: accept | correct | drop; `answer` is what holds from now on, null if dropped.
REVIEWED = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("verdict", pa.string()),
        ("answer", pa.string()),
        ("before", pa.string()),  # the answer that was looked at
        ("answer_key", KEY),  # its provenance
        ("who", pa.string()),
        ("at", pa.string()),  # UTC, ISO 8601
        ("why", pa.string()),
    ]
)

# One row of a published snapshot, as Parquet; the LMDB file holds the same under `query_key`.
CACHED = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("answer", pa.string()),
        ("confidence", pa.float32()),
        ("source", pa.string()),
        ("answer_key", KEY),
        ("count", pa.int64()),
    ]
)

# One request of the live server. `ingest` reads it as a log of queries: column `query`, time in `time`.
REQUEST_LOG = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),
        ("request_id", pa.string()),
        ("query", pa.string()),  # normalised, without personal data
        ("release", pa.string()),
        ("source", pa.string()),
        ("cached", pa.bool_()),
        ("degraded", pa.bool_()),
        ("reason", pa.string()),
        ("confidence", pa.float32()),
        ("latency_ms", pa.float32()),
        ("caller", pa.string()),  # name of the API key
    ]
)

# What a caller said about one answer of the live server; a correction fits the task's schema and guardrails.
FEEDBACK = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),
        ("request_id", pa.string()),  # of the answer; empty where a client answered from its own copy of the snapshot
        ("query", pa.string()),  # normalised, without personal data
        ("release", pa.string()),  # that was served when the feedback came
        ("rating", pa.string()),  # up | down; null: none
        ("used", pa.bool_()),  # whether the answer was used; null: not said
        ("answer", pa.string()),  # the corrected answer, canonical JSON; null: none
        ("shown", pa.string()),  # the answer that it is about, canonical JSON; null: not known
        ("answer_key", pa.string()),  # its provenance, hex; null: not known
        ("comment", pa.string()),  # without personal data
        ("caller", pa.string()),  # name of the API key
    ]
)

# An answer of the live server that another model was asked for too, off the way of the request. `ingest` reads it as a log of queries.
SHADOW = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),
        ("request_id", pa.string()),
        ("query", pa.string()),  # normalised, without personal data
        ("release", pa.string()),
        ("source", pa.string()),
        ("cached", pa.bool_()),
        ("degraded", pa.bool_()),
        ("answer", pa.string()),  # that was served, canonical JSON
        ("confidence", pa.float32()),
        ("side_inputs", pa.string()),  # that came with the query, JSON
        ("model", pa.string()),  # that was asked
        ("state", pa.string()),  # how its answer ended, see State
        ("shadow", pa.string()),  # its answer, canonical JSON; null unless answered
        ("reason", pa.string()),  # why there is none
        ("answer_key", pa.string()),  # of its answer, hex: the key that precompute would give it
        ("score", pa.float32()),  # 0..1: the served answer against its answer, by the task's score; null without an answer
        ("agree", pa.bool_()),  # whether they are wholly the same by that score
        ("tokens_in", pa.int32()),
        ("tokens_out", pa.int32()),
        ("usd", pa.float64()),  # what it cost
    ]
)

# A label that comes from feedback, and how many said what. `design` names how it was drawn: by whoever felt like it, so it is never a
# random draw: ingest and evaluate refuse it as human labels.
FEEDBACK_DESIGN = "feedback"
FEEDBACK_LABELS = pa.schema(
    [
        *HUMAN_LABELS,
        *((name, pa.int64()) for name in ("up", "down", "corrected", "used", "unused")),
    ]
)

# One labelled row as one answer source answered it.
SCORED = pa.schema(
    [
        ("query_key", KEY),
        ("query", pa.string()),
        ("stratum", pa.string()),
        ("count", pa.int64()),
        ("source", pa.string()),
        ("wanted", pa.string()),
        ("given", pa.string()),  # null when there is no valid answer
        ("state", pa.string()),
        ("tp", pa.int32()),
        ("fp", pa.int32()),
        ("fn", pa.int32()),
        ("exact", pa.bool_()),
        ("confidence", pa.float32()),
        *DESIGN,
        ("events", pa.int64()),  # of the query in the traffic that figures speak for; null when there is none
        ("cluster", pa.int64()),  # labelled rows that nearly repeat each other share one
    ]
)

# The traffic that figures speak for, by cell (post_stratify.py): queries, their events, the sum of their squared events.
TRAFFIC_CELL = pa.schema([("cell", pa.int64()), *((name, pa.float64()) for name in ("queries", "events", "squares"))])

# Quality of one answer source on one slice of the labelled rows. Figures are null when the slice has no row.
QUALITY = pa.schema(
    [
        ("source", pa.string()),
        ("stratum", pa.string()),
        ("n", pa.int64()),
        ("answered", pa.int64()),
        ("quality", pa.float64()),  # micro-F1
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("exact", pa.float64()),  # share of rows wholly right
        ("effective", pa.float64()),  # equal rows that would carry as much (Kish)
        ("method", pa.string()),  # how the interval was made
    ]
)


# A judge's score of one answer, 0..1; an answer_key beside it is checked.
JUDGED = pa.schema([("query_key", KEY), ("score", pa.float64())])


def with_top(schema: pa.Schema, top: int) -> pa.Schema:
    """`schema`, with the columns of TOP appended when any likeliest tokens are asked for."""
    return pa.schema([*schema, *TOP]) if top else schema


def check_side_inputs(names: Sequence[str], task: str) -> None:
    """ConfigError for a side input that is named twice, or as a column that headtail makes itself."""
    own = {
        name
        for schema in (QUERY, PLANNED, HOLDOUT, HUMAN_LABELS, ANSWER, TOP, TRAINING_SET, SUSPECT, REVIEWED, SCORED)
        for name in schema.names
    }
    for at, name in enumerate(names):
        if name in own or name in names[:at]:
            what = "a side input has the name of a column that headtail adds itself" if name in own else "a side input is named twice"
            fix = "rename it in task.yaml, in the prompt and in the log" if name in own else "name it once"
            raise ConfigError(what, where=f"task {task}, side_inputs", value=name, fix=fix)


def with_side_inputs(schema: pa.Schema, side_inputs: Sequence[str]) -> pa.Schema:
    """`schema` with one list<string> column per side input appended."""
    for name in side_inputs:
        schema = schema.append(pa.field(name, SIDE_INPUT))
    return schema


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """`table` with exactly the columns of `schema`, in order, cast losslessly. InputError names what is missing or differs."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise InputError(
            f"table lacks column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            where=where,
            value=f"it has {', '.join(table.column_names)}",
            fix="pass the output of the stage that makes this table",
        )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"table does not fit its schema: {error}", where=where) from error


def key_words(keys: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """A column of keys as two arrays of numbers, high word first, whose order is the order of the keys."""
    pieces = keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]
    words = [np.frombuffer(p.buffers()[1], ">u8")[2 * p.offset : 2 * (p.offset + len(p))].reshape(-1, 2) for p in pieces if len(p)]
    both = np.concatenate(words) if words else np.zeros((0, 2), ">u8")
    return both[:, 0].astype(np.uint64), both[:, 1].astype(np.uint64)


def shards_of(keys: pa.ChunkedArray | pa.Array, shards: int) -> npt.NDArray[np.int64]:
    """The shard (0 .. shards-1) of each key: a range of keys, so shards in order are keys in order. Uniform: keys are hashes."""
    return ((key_words(keys)[0] >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)).astype(np.int64)


def uniform_draw(keys: pa.ChunkedArray | pa.Array, purpose: str, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) per key: the same wherever and in whatever order it is asked for; independent between purposes."""
    salt = int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest(), "little")
    x = key_words(keys)[1] ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64, Steele et al. 2014
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(11), np.float64) / 2.0**53
