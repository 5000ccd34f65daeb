"""The files that a replay writes: opened before it begins, in their places only when all of it went well."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sim.report.output_file import OutputError, replacing


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """What the user wants written, and where; None: not wanted."""

    json: Path | None = None
    requests: Path | None = None
    report: Path | None = None
    log: Path | None = None
    perfetto: Path | None = None


@dataclass(frozen=True, slots=True)
class OutputSet:
    """Where to write meanwhile. ``logs`` has one path per run, or is empty."""

    json: Path | None
    requests: Path | None
    report: Path | None
    perfetto: Path | None
    logs: tuple[Path, ...]


@contextmanager
def open_outputs(paths: OutputPaths, run_names: Sequence[str]) -> Iterator[OutputSet]:
    """Find out that every file can be written; put them in their places when the block ends well.

    Raises:
        OutputError: a file cannot be written, or two outputs have the same path.
    """
    logs = _path_per_run(paths.log, run_names)
    single = (paths.json, paths.requests, paths.report, paths.perfetto)
    _check_distinct([path for path in (*single, *logs) if path is not None])
    with ExitStack() as stack:

        def opened(path: Path | None) -> Path | None:
            return None if path is None else stack.enter_context(replacing(path))

        yield OutputSet(
            json=opened(paths.json),
            requests=opened(paths.requests),
            report=opened(paths.report),
            perfetto=opened(paths.perfetto),
            logs=tuple(stack.enter_context(replacing(path)) for path in logs),
        )


def _path_per_run(path: Path | None, run_names: Sequence[str]) -> tuple[Path, ...]:
    """``run.jsonl`` for a single run, ``run.<name>.jsonl`` for each of several."""
    if path is None:
        return ()
    if len(run_names) == 1:
        return (path,)
    return tuple(path.with_name(f"{path.stem}.{name}{path.suffix}") for name in run_names)


def _check_distinct(paths: Sequence[Path]) -> None:
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise OutputError(f"{path}: two outputs have this path; give each a file of its own")
