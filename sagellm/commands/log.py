"""``sagellm log``: what to do with the log of a run."""

import click

EPILOG = """\b
Examples:
  sagellm replay --cluster h200x1 --limit 100 --log run.jsonl
  sagellm log replay run.jsonl
  sagellm log diff run.jsonl other.jsonl
"""


@click.group(epilog=EPILOG)
def log() -> None:
    """Check a run's log against the machines, or against another log."""
