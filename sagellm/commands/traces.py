"""``sagellm traces``: workloads, recorded and generated."""

from pathlib import Path

import click

from sagellm.commands.user_error import user_errors


@click.group(
    epilog="""\b
Examples:
  sagellm traces stats trace.csv
  sagellm traces generate azure-conv --num-requests 1000 --rate 20 --output conv.jsonl
  sagellm replay conv.jsonl
"""
)
def traces() -> None:
    """List, describe and generate workloads."""


@traces.command("list")
def list_command() -> None:
    """Name every generator, with what it makes."""
    from traces.catalog import list_generators

    generators = list_generators()
    width = max(len(generator.name) for generator in generators)
    for generator in generators:
        click.echo(f"{generator.name.ljust(width)}  {generator.summary}")


@traces.command()
@click.argument("file")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of what the file leaves open, such as arrivals inside a coarse timestamp.",
)
def stats(file: str, seed: int) -> None:
    """Describe the trace FILE: its rate, how bursty it is, and how long prompts and outputs are."""
    from traces.errors import TraceError
    from traces.reader import read_trace
    from traces.statistics import describe

    with user_errors(TraceError):
        click.echo(describe(read_trace(file, seed=seed)))


@traces.command()
@click.argument("name")
@click.option(
    "--num-requests",
    "--limit",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many requests.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="REQ_PER_S",
    help="Mean rate of arrivals.  [default: that of the workload's source]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything drawn at random.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Where to write.  [default: standard output]",
)
def generate(name: str, num_requests: int, rate: float | None, seed: int, output: Path | None) -> None:
    """Generate the workload NAME as JSON lines that `replay` and `stats` read."""
    from traces.errors import TraceError
    from traces.formats.own import own_lines
    from traces.generators import generate as generate_trace
    from traces.writer import write_trace

    with user_errors(TraceError):
        trace = generate_trace(name, num_requests=num_requests, rate=rate, seed=seed)
        if output is not None:
            write_trace(trace, output)
            return
    for line in own_lines(trace):
        click.echo(line)
