"""The folder that a run writes to, which is no other run's meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out; it is gone again if nothing came into it.

    The system drops the lock with the process, however that ends. Raises BlockingIOError where
    another run holds it.
    """
    new = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    lock = output_dir / LOCK
    with _locked(lock) as file:
        try:
            yield
        finally:
            # A run's own error counts, not what becomes of its folder.
            with suppress(OSError):
                if list(output_dir.iterdir()) == [lock]:
                    lock.unlink()
                    for path in new:
                        path.rmdir()
            _unlock(file)


def _locked(lock: Path) -> TextIO:
    """The open file under that name, locked: not one that a run's end has just removed."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder, between the two
            file = lock.open("a")
            try:
                _lock(file, lock.parent)
                if os.fstat(file.fileno()).st_nlink > 0:
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


def _unlock(file: TextIO) -> None:
    """Also for children, which have the file open as long as they live."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file: TextIO, output_dir: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{output_dir} is in use by another run. hint: wait until it ends, or choose another "
            "output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks
