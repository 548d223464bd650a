"""The folder that a run writes to, which is no other run's meanwhile."""

from __future__ import annotations

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
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = output_dir / LOCK
    with lock.open("a") as file:
        _lock(file, output_dir)
        try:
            yield
        finally:
            if list(output_dir.iterdir()) == [lock]:
                lock.unlink()
                with suppress(OSError):
                    for path in new:
                        path.rmdir()


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
