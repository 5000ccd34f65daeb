"""``sagellm replay``: what it is told. What it does is in ``replay_run.py``."""

from pathlib import Path

import click

from sagellm.commands.user_error import UserError
from sagellm.core.request import LatencySLO

DEFAULT_TRACE = "azure-conv"
DEFAULT_CLUSTERS = ("h200x4-colocated", "h200x4-pd")

EPILOG = """\b
Examples:
  sagellm replay
      a chat workload on four H200s, colocated against PD-disaggregated
  sagellm replay trace.csv --cluster h200x1 --slo ttft=500ms,tpot=50ms
      a recorded trace on one H200, with the share of requests that keep both limits
  sagellm replay azure-code --rate 20 --limit 5000 --cluster mine.yaml --cluster h200x4-pd
      a generated workload at 20 requests/s on your cluster, beside ours
  sagellm replay --json result.json --requests requests.csv --report report.html
  sagellm replay trace.csv --on http://127.0.0.1:8000
      the same requests at the same times to a server that speaks OpenAI's /v1/completions
  sagellm replay trace.csv --on sim --cluster mine.yaml --on http://127.0.0.1:8000
      both, side by side, and by how many per cent the simulation is off

\b
TTFT is the time to the first token, TPOT the mean time per token after it, ITL each gap between tokens,
E2E the time to the last token; goodput counts the requests per second that keep every limit of the SLO.
With several clusters, --requests gets one more column, `cluster`, and --log writes a file for each:
run.jsonl becomes run.h200x4-pd.jsonl.
On a server a request counts from the moment at which it is sent; 400, 429 and 503 are rejections, and nothing
is sent twice. Prompts are token ids, of the recorded lengths, with the recorded prefixes in common.
"""

OUTPUT_FILE = click.Path(path_type=Path, dir_okay=True)


def _slo(_context: click.Context, _parameter: click.Parameter, value: str | None) -> LatencySLO | None:
    from sagellm.cluster.quantities import parse_slo

    try:
        return None if value is None else parse_slo(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _duration_ns(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    from sagellm.cluster.quantities import parse_duration_ns

    try:
        return parse_duration_ns(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(epilog=EPILOG)
@click.argument("trace", default=DEFAULT_TRACE, metavar="[TRACE]")
@click.option(
    "--cluster",
    "clusters",
    multiple=True,
    metavar="FILE|NAME",
    help="A cluster file, or a name from `sagellm clusters list`; give it several times to compare.  "
    f"[default: {', '.join(DEFAULT_CLUSTERS)}]",
)
@click.option(
    "--on",
    multiple=True,
    default=("sim",),
    metavar="sim|http://HOST:PORT",
    show_default=True,
    help="Where to replay: in simulation, or on a running server; give it several times to compare.",
)
@click.option(
    "--on-model", metavar="NAME", help="The model to ask the server for.  [default: the first of its /v1/models]"
)
@click.option(
    "--api-key", metavar="KEY", envvar="SAGELLM_API_KEY", show_envvar=True, help="What the server wants as its key."
)
@click.option(
    "--request-timeout",
    "request_timeout_ns",
    callback=_duration_ns,
    default="3600s",
    metavar="DURATION",
    show_default=True,
    help="After so long a request to a server counts as failed.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="REQ_PER_S",
    help="Stretch or squeeze arrivals to this mean rate.",
)
@click.option(
    "--rate-scale",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Let requests arrive X times as fast as in the trace.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N requests.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn at random."
)
@click.option(
    "--slo",
    callback=_slo,
    metavar="ttft=500ms,tpot=50ms",
    help="Limits that a request must keep to count as good.  [default: those of the cluster file]",
)
@click.option("--json", "json_path", type=OUTPUT_FILE, metavar="FILE", help="Write the numbers, one object per run.")
@click.option("--requests", "requests_path", type=OUTPUT_FILE, metavar="FILE.csv", help="Write a row per request.")
@click.option("--report", "report_path", type=OUTPUT_FILE, metavar="FILE.html", help="Write one page with charts.")
@click.option(
    "--log", "log_path", type=OUTPUT_FILE, metavar="FILE.jsonl", help="Write every event and effect; see `sagellm log`."
)
@click.option(
    "--perfetto", "perfetto_path", type=OUTPUT_FILE, metavar="FILE.json", help="Write a timeline for ui.perfetto.dev."
)
@click.option("--no-fast-forward", is_flag=True, help="Visit every token; slower, and the same to the nanosecond.")
def replay(
    trace: str,
    clusters: tuple[str, ...],
    on: tuple[str, ...],
    on_model: str | None,
    api_key: str | None,
    request_timeout_ns: int,
    rate: float | None,
    rate_scale: float | None,
    limit: int | None,
    seed: int,
    slo: LatencySLO | None,
    json_path: Path | None,
    requests_path: Path | None,
    report_path: Path | None,
    log_path: Path | None,
    perfetto_path: Path | None,
    no_fast_forward: bool,
) -> None:
    """Replay TRACE on simulated clusters and on running servers, side by side.

    TRACE is a file (Azure, Mooncake, Qwen-Bailian, BurstGPT, Vidur or plain CSV, or our JSON lines;
    recognised by its content) or the name of a generator from `sagellm traces list`.
    """
    if rate is not None and rate_scale is not None:
        raise UserError("--rate and --rate-scale exclude each other; give one of them")

    from sagellm.commands.output_set import OutputPaths
    from sagellm.commands.replay_run import ReplayOptions, run_replay
    from sagellm.commands.replay_targets import choose_targets

    run_replay(
        ReplayOptions(
            trace=trace,
            targets=choose_targets(on, clusters, DEFAULT_CLUSTERS, api_key),
            on_model=on_model,
            request_timeout_s=request_timeout_ns / 1e9,
            rate=rate,
            rate_scale=rate_scale,
            limit=limit,
            seed=seed,
            slo=slo,
            fast_forward=not no_fast_forward,
            outputs=OutputPaths(
                json=json_path,
                requests=requests_path,
                report=report_path,
                log=log_path,
                perfetto=perfetto_path,
            ),
        )
    )
