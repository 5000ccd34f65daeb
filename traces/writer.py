"""Writing a trace in our own form."""

import contextlib
import os

from traces.errors import TraceError
from traces.formats.own import own_lines
from traces.request_trace import Trace


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the trace so that ``read_trace`` gives an equal one.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Raises:
        TraceError: the trace has no requests, or the path cannot be written.
    """
    name = os.fspath(path)
    if not trace.requests:
        raise TraceError(f"{name}: the trace {trace.name!r} has no requests, but must have one or more to be written")
    text = "\n".join(own_lines(trace)) + "\n"
    try:
        if os.path.isdir(name):
            raise TraceError(f"{name}: this is a directory, but must be the path of a file to write")
        _replace(name, text)
    except OSError as error:
        raise TraceError(f"{name}: the file cannot be written: {error.strerror}; choose another path") from None


def _replace(name: str, text: str) -> None:
    temporary = f"{name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, name)
    except BaseException as error:
        # A file of that name that was there before is not ours to remove.
        if not isinstance(error, FileExistsError):
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
