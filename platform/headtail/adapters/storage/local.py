"""A store in a directory of this machine or of a network mount.

In: bytes and files under relative paths. Out: the same, durable: written aside, fsynced, moved in one step, the folder
fsynced. `create` links the file to its name, or, where the file system has no hard links (exFAT, SMB, many FUSE mounts),
renames it without overwriting, which is one step too. Knows nothing of what is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.storage.base import StoredFile, check_path, storage_errors
from headtail.core.errors import StorageError

_ASIDE = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # the name of a file until it is whole
_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LOW_GIB = 1  # of free space: a job that begins with less says so
_FIX = "choose a --root on a file system with hard links (ext4, xfs, NFS), or s3://bucket/prefix instead of a mounted bucket"


@dataclass(frozen=True)
class LocalStorage:
    """A directory. Writes go to a temporary name beside the target, are fsynced, then moved."""

    root: str

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def full(self, path: str) -> str:
        """StorageError when `path` leads out of the root, also by a link in the store."""
        full = os.path.join(self.root, check_path(path, self.root))
        if _has_link(self.root, path):
            real, root = os.path.realpath(full), os.path.realpath(self.root)
            if real != root and not real.startswith(root.rstrip("/") + "/"):
                fix = "mount the folder there instead of linking it, or make it a store of its own"
                raise StorageError("a link in the store leads out of it", where=full, value=real, fix=fix)
        return full

    def local_path(self, path: str) -> Path | None:
        return Path(self.full(path))

    def uri(self, path: str) -> str:
        return os.path.join(self.root, path)

    def exists(self, path: str) -> bool:
        with storage_errors("look", self.full(path)):  # os.path.exists takes "permission denied" and a lost mount for "absent"
            try:
                os.stat(self.full(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def size(self, path: str) -> int:
        with self._reading(path):
            return os.path.getsize(self.full(path))

    def read(self, path: str) -> bytes:
        with self._reading(path):
            return Path(self.full(path)).read_bytes()

    def open(self, path: str) -> pa.NativeFile:
        with self._reading(path):
            return self.filesystem.open_input_file(self.full(path))

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        with storage_errors("read", self.full(path)):
            try:
                yield
            except FileNotFoundError:
                raise StorageError("not in the store", where=self.full(path)) from None

    def _aside(self, path: str) -> Path:
        target = Path(self.full(path))
        _make_folder(target.parent)
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")

    def _write_aside(self, path: str, data: bytes) -> Path:
        aside = self._aside(path)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return aside

    def replace(self, path: str, data: bytes) -> None:
        with storage_errors("write", self.full(path)):
            os.replace(self._write_aside(path, data), self.full(path))
            _sync_folder(Path(self.full(path)).parent)

    def create(self, path: str, data: bytes) -> bool:
        with storage_errors("write", self.full(path)):
            aside = self._write_aside(path, data)
            try:
                move_new(aside, Path(self.full(path)))
            except FileExistsError:
                return False
            finally:
                aside.unlink(missing_ok=True)
            _sync_folder(Path(self.full(path)).parent)
            return True

    def put_file(self, local: Path, path: str) -> None:
        with storage_errors("write", self.full(path)):
            aside = self._aside(path)
            try:
                shutil.move(local, aside)
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, self.full(path))
            except OSError:
                aside.unlink(missing_ok=True)
                raise
            _sync_folder(Path(self.full(path)).parent)

    def fetch(self, path: str, into: Path) -> Path:
        return Path(self.full(path))

    def remove(self, path: str) -> None:
        with storage_errors("remove", self.full(path)):
            folder = Path(self.full(path)).parent
            Path(self.full(path)).unlink(missing_ok=True)
            while folder != Path(self.root):  # folders are no more than parts of names: an empty one goes too
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass  # never there, or another process removes too
                except OSError:
                    break  # it holds something, perhaps since a moment ago
                folder = folder.parent
            if folder.is_dir():
                _sync_folder(folder)

    def files(self, folder: str) -> list[StoredFile]:
        found = []
        for place, _, names in os.walk(self.full(folder)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # finished or removed by another process just now
                    about = os.stat(os.path.join(place, name))
                    when = datetime.datetime.fromtimestamp(about.st_ctime, datetime.UTC)  # a file moved in keeps its old mtime
                    found.append(StoredFile(os.path.relpath(os.path.join(place, name), self.root), about.st_size, when))
        return sorted(found)

    def litter(self, before: datetime.datetime) -> list[StoredFile]:
        return [one for one in self.files("") if one.modified < before and _ASIDE.fullmatch(os.path.basename(one.path))]

    def discard(self, stored: StoredFile) -> None:
        self.remove(stored.path)


def low_space(root: str) -> str:
    """What to say of a directory with little free space; empty when there is enough, or when it is no directory."""
    if not os.path.isdir(root) or (free := shutil.disk_usage(root).free) >= LOW_GIB << 30:
        return ""
    return f"warning: {free / 2**20:.0f} MiB are free below {root}: free space or choose another --root, or the job may end half way"


def move_new(source: Path, target: Path) -> str:
    """Give `source` the name `target` in one step, unless the name is taken (FileExistsError). Returns by what: a link or a rename.

    `source` may stay under its old name too. StorageError when the file system can do neither.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    else:
        return "hard link"
    code = _rename_new(source, target)
    if code in _UNSUPPORTED:
        what = "this file system has neither hard links nor a rename that does not overwrite: two jobs could publish at once"
        raise StorageError(what, where=str(target), fix=_FIX)
    if code:
        raise OSError(code, os.strerror(code), str(target))
    return "rename without overwriting"


def _rename_new(source: Path, target: Path) -> int:
    """Rename by Linux's renameat2 with RENAME_NOREPLACE; its errno, 0 when done. Python's own os.rename overwrites."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux
        return errno.ENOSYS
    here, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    return ctypes.get_errno() if rename(here, os.fsencode(source), here, os.fsencode(target), no_replace) else 0


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durable in the one above."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _has_link(root: str, path: str) -> bool:
    """Whether a part of `path` is a link: a tenth of the time that resolving the whole takes, for what hardly ever is."""
    for part in path.split("/"):
        root = f"{root}/{part}"
        if os.path.islink(root):
            return True
    return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB and some FUSE mounts sync a file's name with the file
            raise
    finally:
        os.close(handle)
