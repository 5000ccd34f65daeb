"""``python -m sim.calibration``: from measured steps to profiles.

``measure`` times the steps of an executor here and fits a profile to them; ``serving`` fits one to the log of
a server; ``fit`` makes the shipped profiles of vLLM from its recorded steps.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sagellm.cost_model.factory import make_step_cost_model
from sagellm.cost_model.price_table import TabulatedStepCost
from sagellm.models.known_models import load_model
from sim.calibration.family_fit import fit_family
from sim.calibration.fit_report import region_errors, summary, table_text
from sim.calibration.h200_vllm import MODEL_ID, family_start, fitted_profile
from sim.calibration.host_fit import HostFit, fit_host
from sim.calibration.measure_command import add_measure_command
from sim.calibration.measured_steps import MeasuredStep, read_requests, read_steps
from sim.calibration.profile_writer import write_profile
from sim.calibration.serving_command import add_serving_command
from sim.calibration.step_fit import fit_steps


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim.calibration", description=__doc__)
    commands = parser.add_subparsers(required=True)
    add_measure_command(commands)
    add_serving_command(commands)
    fit = commands.add_parser("fit", help="fit the vLLM profiles of one H200")
    fit.set_defaults(run=_fit)
    fit.add_argument("--steps", type=Path, required=True, metavar="FILE", help="steps with synchronous scheduling")
    fit.add_argument(
        "--online",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="requests of an asynchronous run; only the host's constants come from it (repeatable)",
    )
    fit.add_argument("--out", type=Path, required=True, metavar="PROFILE", help="the fitted profile to write")
    fit.add_argument("--family-out", type=Path, metavar="PROFILE", help="the profile family to write")
    return parser


def _fit(options: argparse.Namespace) -> None:
    steps = read_steps(options.steps)
    host = HostFit(0.0, 0.0, 0.0)
    if options.online:
        host = fit_host(fit_steps(steps), [read_requests(path) for path in options.online])
    fit = fit_steps(steps, host.seq_us)
    profile = fitted_profile(fit, host)
    profile = replace(
        profile,
        header=replace(
            profile.header,
            fit_error=_report(profile.header.name, make_step_cost_model(profile, profile.model, profile.tp), steps),
        ),
    )
    write_profile(profile, options.out)
    if options.family_out is None:
        return
    model = load_model(MODEL_ID)
    family = fit_family(family_start(), model, steps, fit, host)
    family = replace(
        family,
        header=replace(
            family.header, fit_error=_report(family.header.name, make_step_cost_model(family, model), steps)
        ),
    )
    write_profile(family, options.family_out)


def _report(name: str, cost_model: TabulatedStepCost, steps: Sequence[MeasuredStep]) -> str:
    errors = region_errors(cost_model, steps)
    print(f"{name} against synchronous steps (host and device one after the other)\n{table_text(errors)}\n")
    return summary(errors)


if __name__ == "__main__":
    sys.exit(main())
