"""Output files that are there whole, or not at all, and are known to be writable before the work begins."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(Exception):
    """An output that cannot be written. The message is one sentence for the user."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new, empty file beside ``target`` to write to; it takes ``target``'s place when the block ends well.

    If the block fails, ``target`` stays as it was and nothing else is left. Something that is no plain
    file (a pipe, a terminal) is handed out itself, since it cannot be replaced.

    Raises:
        OutputError: ``target`` cannot be written; raised on entering, except where a disk fills up or
            a folder vanishes in the meantime.
    """
    if target.is_dir():
        raise OutputError(f"{target}: cannot write here: it is a directory; name a file in it")
    if target.exists() and not target.is_file():
        yield target
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"{target}: cannot write here: the file is read-only")
    final = target.resolve()  # a link stays, and the file that it points to is replaced
    temporary = final.with_name(f".{final.stem}.{os.getpid()}{final.suffix}")
    with output_errors(target):
        temporary.touch()
    try:
        yield temporary
        with output_errors(target):
            os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """What the system says against writing ``target``, as an ``OutputError``; wrap writing, and only that."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target}: cannot write here: {error.strerror or error}") from error
