"""Other stores that could hold a snapshot's rows, each with the settings its makers recommend for loading in bulk.

In: (key, value) pairs in order of key. Out: what a lookup finds, and how many bytes the store takes. All of them hold the
same bytes as headtail's LMDB file, so that only the store differs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

Pairs = Iterable[tuple[bytes, bytes]]


class Rival(Protocol):
    """A store under test. `load` ends with everything on disk (in memory, for a store that lives there) and open for reading."""

    name: str
    settings: str

    def load(self, folder: Path, pairs: Pairs) -> None: ...
    def get(self, key: bytes) -> bytes | None: ...
    def bytes(self) -> int: ...
    def close(self) -> None: ...


class Sqlite:
    """SQLite, a clustered table."""

    name = "SQLite"
    settings = (
        "WITHOUT ROWID, one transaction, executemany in order of key, journal and synchronous off, exclusive, fsync at the end; mmap reads"
    )

    def load(self, folder: Path, pairs: Pairs) -> None:
        self.path = folder / "rows.sqlite"
        made = sqlite3.connect(self.path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-262144", "temp_store=MEMORY"):
            made.execute(f"PRAGMA {pragma}")
        made.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
        made.execute("BEGIN")
        made.executemany("INSERT INTO rows VALUES (?, ?)", pairs)
        made.execute("COMMIT")
        made.close()
        sync(self.path)
        self._open = sqlite3.connect(f"file:{self.path}?mode=ro&immutable=1", uri=True, isolation_level=None)
        self._open.execute(f"PRAGMA mmap_size={1 << 40}")
        self._select = self._open.cursor()

    def get(self, key: bytes) -> bytes | None:
        found = self._select.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return None if found is None else bytes(found[0])

    def bytes(self) -> int:
        return self.path.stat().st_size

    def close(self) -> None:
        self._open.close()


class Rocks:
    """RocksDB through rocksdict: sorted files written outside and ingested, which its wiki recommends for bulk loads."""

    def __init__(self, compressed: bool) -> None:
        self.name = "RocksDB, LZ4" if compressed else "RocksDB"
        self.compressed = compressed
        self.settings = (
            "sst files of sorted rows, ingested by move; blocks of 4 KiB with hash index, Bloom filter of 10 bits, block cache of 4 GiB, "
            + ("LZ4" if compressed else "no compression, mmap reads")
        )

    def _options(self) -> Any:
        from rocksdict import BlockBasedOptions, Cache, DataBlockIndexType, DBCompressionType, Options

        blocks = BlockBasedOptions()
        blocks.set_block_size(4096)
        blocks.set_format_version(5)
        blocks.set_bloom_filter(10, False)
        blocks.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
        blocks.set_block_cache(Cache(4 << 30))
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_block_based_table_factory(blocks)
        options.set_compression_type(DBCompressionType.lz4() if self.compressed else DBCompressionType.none())
        options.set_allow_mmap_reads(not self.compressed)
        options.set_optimize_filters_for_hits(True)
        options.increase_parallelism(os.cpu_count() or 1)
        return options

    def load(self, folder: Path, pairs: Pairs) -> None:
        from rocksdict import IngestExternalFileOptions, Rdict, SstFileWriter

        self.folder = folder / ("rocks-lz4" if self.compressed else "rocks")
        options = self._options()
        files: list[str] = []
        rows = iter(pairs)
        while some := list(islice(rows, 1_000_000)):
            files.append(str(folder / f"{self.folder.name}-{len(files):04}.sst"))
            writer = SstFileWriter(options)
            writer.open(files[-1])
            for key, value in some:
                writer[key] = value
            writer.finish()
        self._open = Rdict(str(self.folder), options)
        moved = IngestExternalFileOptions()
        moved.set_move_files(True)
        self._open.ingest_external_file(files, moved)
        self._open.flush()
        for path in self.folder.glob("*.sst"):
            sync(path)
            path.read_bytes()  # its writer drops what it wrote from the page cache; a lookup is measured warm

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._open.get(key)
        return found

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        self._open.close()


class Redis:
    """Redis in a process of its own, spoken to over a Unix socket in its own protocol: less work than any client library does."""

    name = "Redis"
    settings = "own process, Unix socket, pipelined MSET of 1000 rows, GETs one by one, no snapshots, no append-only file, no memory limit"

    def load(self, folder: Path, pairs: Pairs) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="ht-"))  # short: sockets have 107 characters for their path
        path = self._place / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", "--maxmemory", "0", "--loglevel", "warning"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._socket = socket.socket(socket.AF_UNIX)
        for left in reversed(range(200)):
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if not left or self._server.poll() is not None:
                    raise
                time.sleep(0.05)
        rows, waiting = iter(pairs), 0
        while some := list(islice(rows, 1000)):
            words = [b"$16\r\n%b\r\n$%d\r\n%b\r\n" % (key, len(value), value) for key, value in some]
            self._socket.sendall(b"*%d\r\n$4\r\nMSET\r\n" % (2 * len(some) + 1) + b"".join(words))
            waiting += 1
            if waiting == 32:
                self._read(5)
                waiting -= 1
        self._read(5 * waiting)

    def _read(self, size: int) -> None:
        """`size` bytes of +OK replies."""
        got = b""
        while len(got) < size:
            got += self._socket.recv(size - len(got))
        if got != b"+OK\r\n" * (size // 5):
            raise RuntimeError(f"redis said {got!r}")

    def get(self, key: bytes) -> bytes | None:
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$16\r\n%b\r\n" % key)
        got = self._socket.recv(65536)
        head, _, rest = got.partition(b"\r\n")
        if head == b"$-1":
            return None
        size = int(head[1:])
        while len(rest) < size + 2:
            rest += self._socket.recv(65536)
        return rest[:size]

    def bytes(self) -> int:
        self._socket.sendall(b"*2\r\n$4\r\nINFO\r\n$6\r\nmemory\r\n")
        return int(self._socket.recv(65536).split(b"used_memory:")[1].split(b"\r\n")[0])

    def close(self) -> None:
        self._socket.close()
        self._server.terminate()
        self._server.wait()
        shutil.rmtree(self._place, ignore_errors=True)


def rivals() -> Iterator[Rival]:
    """Those that can run here; a line for each that cannot."""
    yield Sqlite()
    if importlib.util.find_spec("rocksdict"):
        yield Rocks(compressed=False)
        yield Rocks(compressed=True)
    else:
        print("RocksDB is left out: rocksdict is not installed (pip install rocksdict)", flush=True)
    if shutil.which("redis-server"):
        yield Redis()
    else:
        print("Redis is left out: redis-server is not installed (Debian: apt-get install redis-server)", flush=True)


def sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
