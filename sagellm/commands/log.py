"""``sagellm log``: what to do with the log of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from sagellm.commands.user_error import UserError, user_errors

if TYPE_CHECKING:
    from sagellm.log_replay import LogDifference

EPILOG = """\b
Examples:
  sagellm replay --cluster h200x1 --limit 100 --log run.jsonl
  sagellm log replay run.jsonl
  sagellm log diff run.jsonl other.jsonl

\b
Exit code 0: no difference, 1: a difference, 2: a file that is no log.
"""

LOG_FILE = click.Path(path_type=Path)


@click.group(epilog=EPILOG)
def log() -> None:
    """Check a run's log against the machines, or against another log.

    A log is every event that a machine was handed and every effect that it gave back, with times.
    """


@log.command("replay")
@click.argument("file", type=LOG_FILE)
@click.pass_context
def replay_command(context: click.Context, file: Path) -> None:
    """Feed the events of FILE to fresh machines, and report the first effect that differs, or none."""
    from sagellm.core.log import LogError
    from sagellm.log_replay import replay_log

    with user_errors(LogError), open_log(file) as lines:
        result = replay_log(lines, str(file))
    if result.difference is None:
        click.echo(
            f"No difference: {result.num_events:,} events gave the same {result.num_effects:,} effects "
            f"in {result.num_polls:,} polls."
        )
        return
    _show_difference(f"{file}, line {result.difference.line}", result.difference, "recorded", "replayed")
    context.exit(1)


@log.command()
@click.argument("file", type=LOG_FILE)
@click.argument("other", type=LOG_FILE)
@click.pass_context
def diff(context: click.Context, file: Path, other: Path) -> None:
    """Report the first record in which FILE and OTHER differ, or that they are the same run."""
    from sagellm.core.log import LogError
    from sagellm.log_replay import diff_logs

    with user_errors(LogError), open_log(file) as lines, open_log(other) as other_lines:
        difference = diff_logs(lines, str(file), other_lines, str(other))
    if difference is None:
        click.echo("No difference.")
        return
    _show_difference(f"Line {difference.line}", difference, str(file), str(other))
    context.exit(1)


@contextmanager
def open_log(path: Path) -> Iterator[IO[bytes]]:
    """The file's lines, as they are needed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read this log: {error.strerror}") from error
    with file:
        yield file


def _show_difference(where: str, difference: "LogDifference", name: str, other_name: str) -> None:
    click.echo(f"{where}: {difference.machine} differs at {difference.now_ns:,} ns")
    click.echo(f"  {name}: {difference.recorded}")
    click.echo(f"  {other_name}: {difference.replayed}")
