"""A snapshot without some of its queries: read from the snapshot itself, built anew, with the log's words counted down.

In: a published snapshot, query keys. Out: another snapshot in the store, with the same lineage. The one before is not touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headtail.adapters.storage import Storage, stream_table
from headtail.cache.builder import OFFERED, build_snapshot
from headtail.cache.manifest import SnapshotManifest, manifest_path, read_manifest, snapshot_path
from headtail.cache.snapshot import publish_snapshot
from headtail.cache.words import WORDS, load_words
from headtail.core.errors import InputError
from headtail.core.receipt import FileRef
from headtail.core.rows import KEY, State


def snapshot_holds(store: Storage, snapshot: str, keys: Collection[bytes]) -> bool:
    """Whether a snapshot has one of `keys`.

    One without a manifest (its publish or its collection was killed) is looked at too. What is left of it without its table cannot be
    read: it counts as one that does.
    """
    if store.exists(manifest_path(snapshot)):
        ref: FileRef | str = read_manifest(store, snapshot).files["answers"]
    elif not store.exists(ref := f"{snapshot_path(snapshot)}/answers.parquet"):
        return bool(store.files(snapshot_path(snapshot)))
    wanted = pa.array(list(keys), KEY)
    return any(pc.any(pc.is_in(batch.column("query_key"), value_set=wanted)).as_py() for batch in stream_table(store, ref, ["query_key"]))


def publish_without(store: Storage, snapshot: str, keys: Collection[bytes], events: Mapping[str, int]) -> SnapshotManifest:
    """Publish what `snapshot` holds but for `keys`. `events`: of the log's words, how many go with them.

    InputError when nothing would be left.
    """
    before, wanted = read_manifest(store, snapshot), pa.array(list(keys), KEY)

    def remaining_rows() -> Iterator[pa.Table]:
        for batch in stream_table(store, before.files["answers"]):
            table = pa.Table.from_batches([batch])
            table = table.filter(pc.invert(pc.is_in(table["query_key"], value_set=wanted)))
            yield table.append_column("state", pa.repeat(pa.scalar(str(State.ANSWERED)), table.num_rows)).cast(OFFERED)

    with tempfile.TemporaryDirectory(prefix="headtail-erase-") as scratch:
        folder = Path(scratch) / "snapshot"
        folder.mkdir()
        built = build_snapshot([remaining_rows()], folder, share_redacted=True, labels=[f"snapshot {snapshot}"])
        if not built.rows:
            raise InputError(
                "nothing would be left in this snapshot", where=store.uri(f"snapshots/{snapshot}"), fix="remove the whole store"
            )
        words: Path | None = None
        if known := load_words(store, snapshot):
            counts = {word: count - events.get(word, 0) for word, count in known.items()}
            words = Path(scratch) / "words.parquet"
            rows = [{"word": word, "count": count} for word, count in counts.items() if count >= min(known.values())]
            pq.write_table(pa.Table.from_pylist(rows, schema=WORDS), words, compression="zstd")
        return publish_snapshot(
            store,
            built._replace(left_out=before.left_out),
            task=before.task,
            task_fingerprint=before.task_fingerprint,
            lineage=before.lineage,
            min_confidence=before.min_confidence,
            coverage=before.coverage,
            words=words,
        )
