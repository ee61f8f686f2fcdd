"""API keys: who may call the server, for what, and how fast.

In: a file of records (`headtail keys` writes it). Out: for an Authorization header the ApiKey that it holds, or a RequestError.
A key is 32 random bytes and is shown once. The file holds a digest of it under a salt of the file: a fast keyed hash is right, since
nobody can guess 256 random bits at any speed; a slow hash such as bcrypt is for passwords, and would cost 100 ms a request.
A changed file is read again within a second, without a restart. Knows nothing of HTTP paths.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from headtail.core.config import Config, build_config
from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.paths import StoreId
from headtail.core.record import Moment, parse_object
from headtail.stages.serve.errors import RequestError

log = logging.getLogger("headtail.serve")
SCOPES = {
    "answer": "ask for answers, and give feedback on them",
    "metrics": "read /metrics",
    "admin": "change what is served: releases, overrides, deletions",
}
MOST_KEYS = 4096  # names; each has a place in the rate limiter's array, place 0 is for callers without a key
FORMAT = 1
PREFIX = "htk_"  # so that scanners for leaked secrets know one
_SECRET_BYTES = 32
_LONGEST = 256  # bytes of an Authorization header; a longer one cannot hold one of these keys
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_FIX = "write the file with `headtail keys`, or restore it from a copy"


def _scope(text: str) -> str:
    if text not in SCOPES:
        raise ValueError(f"unknown scope {text[:40]!r}; known: {', '.join(SCOPES)}")
    return text


class KeyRecord(Config):
    """One key, as the file holds it."""

    name: StoreId = Field(description="who it is for; during a rotation two records have one name")
    digest: str = Field(description="64 hex digits: keyed BLAKE2b of the key", pattern="^[0-9a-f]{64}$")
    scopes: tuple[Annotated[str, AfterValidator(_scope)], ...] = Field(description="; ".join(f"{k}: {v}" for k, v in SCOPES.items()))
    per_s: float = Field(0.0, ge=0, allow_inf_nan=False, description="requests per second; 0: no limit")
    burst: int = Field(1, ge=1, description="requests at once")
    slot: int = Field(ge=1, lt=MOST_KEYS, description="place in the rate limiter's array; records of one name share it")
    created: Moment = Field(description="UTC, ISO 8601")
    until: Annotated[str, AfterValidator(lambda text: _end_of(text) and text)] = Field(
        "", description="UTC, ISO 8601: when the key ends; empty: never"
    )


class KeyFile(Config):
    """The file."""

    format: int = Field(FORMAT, description="layout of this file", ge=FORMAT, le=FORMAT)
    salt: str = Field(description="32 hex digits: key of the hash", pattern="^[0-9a-f]{32}$")
    keys: tuple[KeyRecord, ...] = Field((), description="the keys")


class ApiKey(NamedTuple):
    """A key that was checked and is valid. `interval`: seconds between requests in the long run, 0 for no limit."""

    name: str
    scopes: frozenset[str]
    slot: int
    interval: float
    burst: int
    until: float


def _end_of(until: str) -> float:
    """A moment in seconds since 1970; infinity when there is none."""
    if not until:
        return math.inf
    found = datetime.datetime.fromisoformat(until)
    if found.tzinfo is None:
        raise ValueError("a time needs its time zone, such as +00:00")
    return found.timestamp()


def parse_rate(text: str) -> float:
    """Requests per second of `100/s`, `6000/min` or `50/h`; 0 of an empty text."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)/(s|min|h)", text)
    if text and (match is None or not float(match[1])):
        raise ConfigError("this is no rate", where="--rate", value=text, fix="write a number and a unit: 100/s, 6000/min, 50/h")
    return float(match[1]) / _UNITS[match[2]] if match else 0.0


class KeyRing:
    """The keys of a file, for one process. `reload_failures`: changes that could not be read; the keys from before stay valid."""

    def __init__(self, path: Path, look_every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._every, self._clock, self.reload_failures = path, look_every_s, clock, 0
        self._stamp = _stamp(path)
        self._state = _index(read_keys(path))
        self._next = clock() + look_every_s

    def find(self, authorization: bytes) -> ApiKey | None:
        """The key in an Authorization header, or None.

        The digest is looked up, never the key. How long a comparison of digests takes tells a caller nothing: without the salt he cannot
        choose the digest of what he sends.
        """
        if self._clock() >= self._next:
            self._look()
        if len(authorization) > _LONGEST or authorization[:7].lower() != b"bearer ":
            return None
        hasher, keys = self._state
        digest = hasher.copy()
        digest.update(authorization[7:].strip())
        key = keys.get(digest.digest())
        return None if key is None or key.until <= time.time() else key

    def check(self, authorization: bytes | None, scope: str) -> ApiKey:
        """The key in an Authorization header. RequestError 401 without a valid one, whatever is wrong with it; 403 without the scope."""
        key = self.find(authorization or b"")
        if key is None:
            raise RequestError("unauthorized")
        if scope not in key.scopes:
            raise RequestError("forbidden")
        return key

    def _look(self) -> None:
        self._next = self._clock() + self._every
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._state = _index(read_keys(self._path))  # one assignment: no request sees half of it
        except HeadtailError as error:  # half edited by hand, or removed: callers with valid keys must still get answers
            self.reload_failures += 1
            log.error("the changed file of API keys cannot be used, the keys before it go on: %s", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _index(file: KeyFile) -> tuple[Any, dict[bytes, ApiKey]]:
    keys = {}
    for held in file.keys:
        interval = 1 / held.per_s if held.per_s else 0.0
        key = ApiKey(held.name, frozenset(held.scopes), held.slot, interval, held.burst, _end_of(held.until))
        keys[bytes.fromhex(held.digest)] = key
    return hashlib.blake2b(key=bytes.fromhex(file.salt), digest_size=32), keys


def read_keys(path: Path) -> KeyFile:
    """The file of keys. ConfigError when it is missing, damaged, or when others may write or read it."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())  # of the file that is open, not of one that replaced it meanwhile
            data = file.read()
    except OSError as error:
        fix = "make the first key: headtail keys add NAME --file FILE"
        raise ConfigError(f"the file of API keys cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    if found.st_uid not in (0, os.geteuid()):
        what = "the file of API keys belongs to another user, who could add a key"
        raise ConfigError(what, where=str(path), value=f"user {found.st_uid}", fix=f"chown it to user {os.geteuid()} or root")
    if found.st_mode & 0o037:  # the group may read: Kubernetes mounts a secret for root and the pod's group, with 0440
        what = "the file of API keys can be changed by its group, or read by everyone"
        raise ConfigError(what, where=str(path), value=oct(found.st_mode & 0o777), fix="chmod 600 it")
    return build_config(KeyFile, parse_object(data, str(path), ConfigError, _FIX), str(path))


@contextmanager
def _editing(path: Path) -> Iterator[None]:
    """One writer at a time."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        fix = "name a file in a folder that is there and that you may write"
        raise ConfigError(f"the file of API keys cannot be written: {error.strerror}", where=str(path), fix=fix) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, file: KeyFile) -> None:
    """Replace the file in one step: a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        out.write(file.model_dump_json(indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def _new(file: KeyFile, name: str, scopes: Sequence[str], per_s: float, burst: int, slot: int, until: str) -> tuple[str, KeyRecord]:
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    digest = hashlib.blake2b(secret.encode(), key=bytes.fromhex(file.salt), digest_size=32).hexdigest()
    fields = {"name": name, "digest": digest, "scopes": tuple(scopes), "per_s": per_s, "burst": burst, "slot": slot}
    return secret, build_config(KeyRecord, {**fields, "created": _now().isoformat(timespec="seconds"), "until": until}, "headtail keys")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def add_key(path: Path, name: str, scopes: Sequence[str], per_s: float = 0.0, burst: int = 1, until: str = "") -> str:
    """A new key, which is kept nowhere. The file is made when it is not there. ConfigError when the name is in use."""
    with _editing(path):
        file = read_keys(path) if path.exists() else KeyFile(salt=secrets.token_hex(16))
        if any(held.name == name for held in file.keys):
            fix = "choose another name, or give it a new key: headtail keys rotate"
            raise ConfigError("a key of this name exists", where=str(path), value=name, fix=fix)
        used = {held.slot for held in file.keys}
        slot = next((slot for slot in range(1, MOST_KEYS) if slot not in used), None)
        if slot is None:
            raise ConfigError(f"the file has {MOST_KEYS - 1} keys, and no more fit", where=str(path), fix="revoke what is not used")
        secret, record = _new(file, name, scopes, per_s, burst, slot, until)
        _write(path, file.model_copy(update={"keys": (*file.keys, record)}))
        return secret


def revoke_key(path: Path, name: str) -> int:
    """End every key of a name at once. Returns how many there were. ConfigError when there is none."""
    with _editing(path):
        file = read_keys(path)
        kept = tuple(held for held in file.keys if held.name != name)
        gone = len(file.keys) - len(kept)
        if not gone:
            raise _no_such(path, name)
        _write(path, file.model_copy(update={"keys": kept}))
        return gone


def rotate_key(path: Path, name: str, overlap_s: float) -> str:
    """A new key for a name, with the scopes and limits of the newest one; the ones before it end `overlap_s` seconds from now."""
    with _editing(path):
        file = read_keys(path)
        last = next((held for held in reversed(file.keys) if held.name == name), None)
        if last is None:
            raise _no_such(path, name)
        end = _now() + datetime.timedelta(seconds=overlap_s)
        alive = [held for held in file.keys if _end_of(held.until) > time.time()]
        kept = [_ending(held, end) if held.name == name else held for held in alive]
        secret, record = _new(file, name, last.scopes, last.per_s, last.burst, last.slot, last.until)
        _write(path, file.model_copy(update={"keys": (*kept, record)}))
        return secret


def _ending(held: KeyRecord, end: datetime.datetime) -> KeyRecord:
    sooner = _end_of(held.until) <= end.timestamp()
    return held if sooner else held.model_copy(update={"until": end.isoformat(timespec="seconds")})


def _no_such(path: Path, name: str) -> ConfigError:
    return ConfigError("there is no key of this name", where=str(path), value=name, fix="see: headtail keys list")
