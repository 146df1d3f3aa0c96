"""Directories and files that are either whole or absent, and checksums. Knows no format; see bundle.py for one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fstq_infer.errors import BundleError, BundleExistsError, BundlePathError, BundleSizeError
from fstq_infer.leftovers import leftover, lock_file, try_lock

BLOCK_BYTES = 1 << 20


def sha256_file(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Hex SHA-256 of a file, read in blocks of 1 MiB; links are followed.

    size: the number of bytes the file must have; never more than ``size`` + 1 bytes are read.
    Raises BundleSizeError when it has more or fewer, OSError when it cannot be read.
    """
    digest, seen = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES if size is None else min(BLOCK_BYTES, size + 1 - seen)):
            seen += len(block)
            if size is not None and seen > size:
                break
            digest.update(block)
    if size is not None and seen != size:
        found = f"more than {size}" if seen > size else str(seen)
        raise BundleSizeError(f"{path}: read {found} bytes, expected {size}. Stop what is writing to it and try again.")
    return digest.hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, or a power cut, finds the old content or the new one. Raises OSError."""
    with staged_file(path, data) as place:
        place()


@contextlib.contextmanager
def staged_file(path: Path, data: bytes) -> Iterator[Callable[[], None]]:
    """Yield what puts ``data``, which is on the disk by then, in place of ``path``; without that, nothing changes.

    The data waits in a hidden sibling ``.NAME.partial-PID-RANDOM``. What killed writers of the same name left goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale_files(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _locked_file(partial) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # where open files cannot be renamed
                file.close()

            def place() -> None:
                os.replace(partial, path)
                _sync(path.parent)

            yield place
    finally:
        partial.unlink(missing_ok=True)


def _locked_file(path: Path) -> BinaryIO:
    """A new file, locked until it is closed where locks work. Raises OSError."""
    while True:
        file = open(path, "xb")  # noqa: SIM115 (the caller closes it)
        try:
            lock_file(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another writer took it for a leftover before it was locked


def _clear_stale_files(path: Path) -> None:
    pattern = re.compile(re.escape(f".{path.name}.") + r"partial-([0-9]{1,10})(?:-[0-9a-f]{8})?")
    for name in os.listdir(path.parent):
        found, old = pattern.fullmatch(name), path.parent / name
        if found and not old.is_symlink() and old.is_file():
            with contextlib.suppress(OSError), leftover(old, int(found[1]), by_age=True) as stale:
                if stale:
                    old.unlink()


@contextlib.contextmanager
def atomic_directory(
    out: str | os.PathLike[str], overwrite: bool = False, marker: str = "manifest.json"
) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends, and goes away when it raises.

    Arguments and errors are those of :class:`PartialDirectory`.
    """
    with PartialDirectory(out, overwrite, marker) as partial:
        yield partial.path
        partial.commit()


class PartialDirectory:
    """A hidden sibling ``.NAME.partial-PID`` of ``out`` that :meth:`commit` renames to ``out``.

    overwrite: replace an existing ``out``, if it is an empty directory or one that holds a file named ``marker``.
    Leaving the context without a commit removes the partial directory. Entering it clears what killed writers of the
    same name left; an old ``out`` that such a writer had set aside and not yet replaced is put back.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False, marker: str = "manifest.json") -> None:
        self.out = Path(out).absolute()
        if self.out.name in ("", "..") or "\0" in self.out.name:
            raise BundlePathError(f"{os.fspath(out)!a} names no directory that can be written. Choose another path.")
        self.path = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self._aside = self.out.parent / f".{self.out.name}.old-{os.getpid()}"
        self._overwrite, self._marker = overwrite, marker
        self._lock: int | None = None
        self._open = False

    def __enter__(self) -> PartialDirectory:
        """Make the empty directory ``path``. Raises BundleExistsError, or BundleError where nothing can be written."""
        with _os_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._clear_stale()
            self._check_out()
            if os.path.lexists(self.path):
                raise BundleExistsError(
                    f"{self.path} exists: this process is writing {self.out} already. Wait until it has finished, "
                    f"or remove the directory if nothing writes to it."
                )
            self.path.mkdir()
            self._open = True
            self._lock = try_lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self._close()

    def commit(self) -> None:
        """Flush everything to disk and rename to ``out``; an old ``out`` goes away only after that.

        Raises BundleExistsError if ``out`` has appeared meanwhile, BundleError when a rename or a flush fails; the old
        ``out`` is then in its place again.
        """
        if not self._open:
            raise BundleError(f"{self.out}: nothing to commit. Call commit() once, inside the 'with' block.")
        with _os_errors(self.out):
            for folder, _, names in os.walk(self.path):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            self._check_out()
            try:
                if os.path.lexists(self.out):
                    os.rename(self.out, self._aside)
                os.rename(self.path, self.out)
            except BaseException:  # Ctrl-C too; decided by what is on disk, because it may come between any two lines
                if os.path.lexists(self._aside) and not os.path.lexists(self.out):
                    os.rename(self._aside, self.out)
                raise
            _sync(self.out.parent)
        self._close()

    def _close(self) -> None:
        """Remove what is partial and what was replaced, and let go of the lock."""
        self._open = False
        shutil.rmtree(self.path, ignore_errors=True)
        if os.path.lexists(self._aside) and os.path.lexists(self.out):
            # Under the partial name a half-removed directory cannot be mistaken for a whole one that was set aside.
            with contextlib.suppress(OSError):
                os.rename(self._aside, self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_out(self) -> None:
        try:
            mode = os.lstat(self.out).st_mode
        except FileNotFoundError:
            return
        if not self._overwrite:
            raise BundleExistsError(f"{self.out} exists already. Pass --force to replace it, or choose another path.")
        if not stat.S_ISDIR(mode):
            raise BundleExistsError(
                f"{self.out} is a file or a link, expected a directory; it will not be replaced. Choose another path."
            )
        names = os.listdir(self.out)
        if names and self._marker not in names:
            raise BundleExistsError(
                f"{self.out} holds files but no {self._marker}, so it was not written by this tool and will not be "
                f"replaced. Choose another path, or empty the directory."
            )

    def _clear_stale(self) -> None:
        pattern = re.compile(re.escape(f".{self.out.name}.") + r"(partial|old)-([0-9]{1,10})")
        for name in sorted(os.listdir(self.out.parent)):
            found, path = pattern.fullmatch(name), self.out.parent / name
            if not found or path.is_symlink() or not path.is_dir():
                continue
            with leftover(path, int(found[2])) as stale:
                if stale and found[1] == "old" and not os.path.lexists(self.out):
                    os.rename(path, self.out)  # its writer died between the two renames: this is the only whole copy
                elif stale:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{out} cannot be written: {error}. Check permissions and free space, or choose another path."
        ) from error


def _sync(path: Path) -> None:
    """Flush a regular file or a directory to disk; anything else (a fifo would block) is left alone."""
    mode = os.lstat(path).st_mode
    if os.name == "nt" or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
