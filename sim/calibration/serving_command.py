"""``python -m sim.calibration serving``: a profile of a model as it is served, from a server's log."""

import argparse
from pathlib import Path

from sim.calibration.measured_profile import Measurement, measured_profile
from sim.calibration.profile_writer import write_profile
from sim.calibration.served_log import plan_lead_ns_of, read_replays
from sim.calibration.serving_fit import ServedReplay, ServingFit, fit_serving, read_client_ttft_ms
from sim.calibration.table_fit import errors_text

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
    parser.add_argument("--log", type=Path, required=True, help="what `sagellm serve --log` wrote")
    parser.add_argument(
        "--requests",
        type=Path,
        action="append",
        required=True,
        metavar="CSV",
        help="what `sagellm replay --on URL --requests` wrote, one for each replay of the log, in their order",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PROFILE", help="the profile to write")


def _fit_serving(options: argparse.Namespace) -> None:
    replays = list(read_replays(options.log).values())
    if len(replays) != len(options.requests):
        given = len(options.requests)
        raise ValueError(f"{options.log}: holds {len(replays)} replays, but --requests was given {given} times")
    clients = [read_client_ttft_ms(path) for path in options.requests]
    fit = fit_serving([ServedReplay(logged, ttft_ms) for logged, ttft_ms in zip(replays, clients, strict=True)])
    device_profile = options.device_profile or f"{options.backend}/spec"
    measurement = serving_measurement(options.model, options.backend, device_profile, options.num_threads, fit)
    request_ns, lead_ns = round(fit.request_us * 1e3), plan_lead_ns_of(options.log)
    write_profile(measured_profile(measurement, fit.table, request_ns, lead_ns), options.out)
    for errors in fit.errors:
        print(
            f"{errors.kind:<8}{errors.num_steps:>7} steps, price against time: median {errors.median:+.1%}, "
            f"|error| p50 {errors.median_absolute:.1%}, p90 {errors.p90_absolute:.1%}"
        )
    print(f"request  {fit.request_us:.0f} us on its way in and out (median of {fit.num_requests})\nwrote {options.out}")
