"""A progress bar on a terminal, and silence in a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


@contextmanager
def progress_bar(label: str, num_total: int) -> Iterator[Callable[[int], None] | None]:
    """What to call with the number of things done so far; None where nobody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=num_total, label=label, file=sys.stderr) as bar:

        def show(num_done: int) -> None:
            bar.update(num_done - bar.pos)

        yield show
        bar.update(num_total - bar.pos)
