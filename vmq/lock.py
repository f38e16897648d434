"""A file or folder that is being written belongs to one process at a time.

The lock is the kernel's (flock) on a hidden file beside what it stands for: it ends with the process, however that
ends, so a lock that was left behind is no lock. Whoever holds it removes the file when done; one that comes to hold a
file that is not there any more tries again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vmq.errors import OutputError


@contextlib.contextmanager
def locked(targets: Iterable[Path]) -> Iterator[None]:
    """Hold files or folders that are going to be written.

    Raises:
        OutputError: another process holds one of them, or its folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        for target in targets:
            held.enter_context(_locked(target))
        yield


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    target = Path(os.path.abspath(target))  # noqa: PTH100  (not through links: the name beside which the lock stands)
    path = target.parent / f".{target.name}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _open(path, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another place") from error
    try:
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _open(path: Path, target: Path) -> int:
    """A descriptor of the lock's file, which is locked and still there."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
            os.close(handle)
        except FileNotFoundError:
            os.close(handle)
        except BlockingIOError:
            who = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            raise OutputError(f"{target} is being written by another process{who and f' ({who})'}; wait for it, or "
                              "give another name") from None
