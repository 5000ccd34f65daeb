"""``sagellm traces``: workloads, recorded and generated."""

from pathlib import Path

import click

from sagellm.commands.user_error import user_errors

EPILOG = """\b
Examples:
  sagellm traces stats trace.csv
  sagellm traces generate azure-conv --num-requests 1000 --rate 20 --output conv.jsonl
  sagellm replay conv.jsonl
"""


@click.group(epilog=EPILOG)
def traces() -> None:
    """List, describe and generate workloads."""


@traces.command("list")
def list_command() -> None:
    """Name every generator, with what it makes and at what rate by default."""
    from traces.catalog import list_generators

    generators = list_generators()
    width = max(len(generator.name) for generator in generators)
    for generator in generators:
        rate = f"{generator.default_rate_rps:g} requests/s"
        click.echo(f"{generator.name.ljust(width)}  {rate:>15}  {generator.description}")


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
    from traces.format_statistics import format_statistics
    from traces.reader import read_trace
    from traces.statistics import trace_statistics

    with user_errors(TraceError):
        trace = read_trace(file, seed=seed)
    for line in format_statistics(trace_statistics(trace)):
        click.echo(line)
    for note in trace.notes:
        click.echo(f"note: {note}")


@traces.command()
@click.argument("name")
@click.option(
    "-n",
    "--num-requests",
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
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn at random."
)
@click.option(
    "--lengths",
    metavar="NAME|PROMPT:OUTPUT",
    help="For poisson and gamma: lengths of another generator, or fixed ones such as 1024:128.",
)
@click.option("--cv", type=float, metavar="CV", help="For gamma: how bursty arrivals are; 1 is Poisson.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Where to write.  [default: standard output]",
)
def generate(
    name: str,
    num_requests: int,
    rate: float | None,
    seed: int,
    lengths: str | None,
    cv: float | None,
    output: Path | None,
) -> None:
    """Generate the workload NAME as JSON lines that `replay` and `stats` read."""
    from traces.errors import TraceError
    from traces.formats.own import own_lines
    from traces.generators import generate as generate_trace
    from traces.writer import write_trace

    with user_errors(TraceError):
        trace = generate_trace(name, num_requests=num_requests, rate=rate, seed=seed, lengths=lengths, cv=cv)
        if output is not None:
            write_trace(trace, output)
            return
    for line in own_lines(trace):
        click.echo(line)
