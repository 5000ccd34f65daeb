"""``python -m sim.calibration serving``: adds to a profile what serving adds to its steps."""

import argparse
from pathlib import Path

from backends.profile_files import read_profile
from sagellm.cluster.errors import ClusterFileError
from sagellm.cluster.reading import read_cluster
from sagellm.cost_model.profile import FittedProfile
from sim.calibration.serving_fit import fit_serving, read_served_requests, read_served_steps
from traces.errors import TraceError
from traces.reader import read_trace


def add_serving_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's options; it is run through ``run``."""
    parser = commands.add_parser("serving", help="add to a measured profile what serving adds to its steps")
    parser.set_defaults(run=_fit_serving)
    parser.add_argument("--profile", type=Path, required=True, help="what `measure` wrote")
    parser.add_argument("--cluster", required=True, help="the cluster file that was served")
    parser.add_argument("--trace", required=True, help="what was sent; some of it one request after the other")
    parser.add_argument("--log", type=Path, required=True, help="what `sagellm serve --log` wrote")
    parser.add_argument("--requests", type=Path, required=True, help="what `sagellm replay --on --requests` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the profile to write")


def _fit_serving(options: argparse.Namespace) -> None:
    profile = read_profile(options.profile)
    if not isinstance(profile, FittedProfile):
        raise ValueError(f"{options.profile}: not a fitted profile; give one that `measure` wrote")
    steps, requests = read_served_steps(options.log), read_served_requests(options.requests)
    try:
        cluster, trace = read_cluster(options.cluster), read_trace(options.trace, seed=0)
    except (ClusterFileError, TraceError) as error:
        raise ValueError(str(error)) from error
    share = fit_serving(profile, cluster, trace, steps, requests, options.out)
    print(f"serving adds {share} ({len(steps)} steps, {len(requests)} requests)\nwrote {options.out}")
