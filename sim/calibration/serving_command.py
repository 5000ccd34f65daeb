"""``python -m sim.calibration serving``: a profile of a model as it is served, from a server's log."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sim.calibration.measured_profile import Measurement, measured_profile
from sim.calibration.profile_writer import write_profile
from sim.calibration.served_log import plan_lead_ns_of, read_replays
from sim.calibration.serving_fit import ServedReplay, ServingFit, fit_serving, read_client_ttft_ms
from sim.calibration.table_fit import errors_text

HELD_BACK = "-"
SOURCE = "python -m sim.calibration serving: steps of a server under replayed load, from its log"


def serving_measurement(
    model: str, backend: str, device_profile: str, num_threads: int, fit: ServingFit
) -> Measurement:
    """What the profile says of itself."""
    return Measurement(
        model=model,
        backend=backend,
        device_profile=device_profile,
        num_threads=num_threads,
        source=SOURCE,
        fit_error=errors_text(fit.errors),
        notes=(
            f"{fit.num_steps} steps and {fit.num_requests} requests",
            "a step's price is its period in a server: front, driver and client had their share of the processor",
        ),
    )


def add_serving_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's options; it is run through ``run``."""
    parser = commands.add_parser("serving", help="fit a profile to the log of a server, and to what clients saw")
    parser.set_defaults(run=_fit_serving)
    parser.add_argument("--model", required=True, help="what was served: a known model, or a config.json")
    parser.add_argument("--backend", default="cpu", help="what ran it (default: cpu)")
    parser.add_argument("--device-profile", metavar="NAME", help="whose device sheet to take over")
    parser.add_argument("--num-threads", type=int, default=0, help="of the CPU backend, as `sagellm serve` had it")
    parser.add_argument("--name", default="", help="the profile's name (default: BACKEND/measured)")
    parser.add_argument("--hardware", default="", help="the device's name, where the log is another machine's")
    parser.add_argument("--software", default="", help='likewise, what the backend ran on, as "torch 2.11.0"')
    parser.add_argument("--note", action="append", default=[], help="to be kept in the profile (repeatable)")
    parser.add_argument(
        "--log",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="what `sagellm serve --log` wrote (repeatable)",
    )
    parser.add_argument(
        "--requests",
        action="append",
        required=True,
        metavar="CSV",
        help="what `sagellm replay --on URL --requests` wrote, one for each replay of the logs, in their order; "
        f"{HELD_BACK} for a replay that the fit is not to see",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PROFILE", help="the profile to write")


def _fit_serving(options: argparse.Namespace) -> None:
    fit = fit_serving(list(_served_replays(options.log, options.requests)))
    device_profile = options.device_profile or f"{options.backend}/spec"
    measurement = serving_measurement(options.model, options.backend, device_profile, options.num_threads, fit)
    measurement = replace(
        measurement,
        name=options.name,
        hardware=options.hardware,
        software=options.software,
        notes=(*options.note, *measurement.notes),
    )
    request_ns, lead_ns = round(fit.request_us * 1e3), max(map(plan_lead_ns_of, options.log))
    write_profile(measured_profile(measurement, fit.table, request_ns, lead_ns), options.out)
    for errors in fit.errors:
        print(
            f"{errors.kind:<8}{errors.num_steps:>7} steps, price against time: median {errors.median:+.1%}, "
            f"|error| p50 {errors.median_absolute:.1%}, p90 {errors.p90_absolute:.1%}"
        )
    print(f"request  {fit.request_us:.0f} us on its way in and out (median of {fit.num_requests})\nwrote {options.out}")


def _served_replays(logs: Sequence[Path], requests: Sequence[str]) -> Iterator[ServedReplay]:
    """Those that are not held back. Raises ValueError unless every replay has its requests, or ``HELD_BACK``."""
    replays = [replay for log in logs for replay in read_replays(log).values()]
    if len(replays) != len(requests):
        names = ", ".join(map(str, logs))
        raise ValueError(f"{names}: {len(replays)} replays, but --requests was given {len(requests)} times")
    for logged, path in zip(replays, requests, strict=True):
        if path != HELD_BACK:
            yield ServedReplay(logged, read_client_ttft_ms(Path(path)))
