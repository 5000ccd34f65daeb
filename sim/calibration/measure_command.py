"""``python -m sim.calibration measure``: a profile of a model on this machine, from its executor's own steps."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from backends.errors import BackendError
from backends.executor_settings import ExecutorSettings
from backends.profile_files import load_profile
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId
from sagellm.cost_model.profile import FittedProfile
from sim.calibration.measured_profile import Measurement, measured_profile
from sim.calibration.probe_design import probe_cases, probe_range
from sim.calibration.probed_instance import Case, ProbedInstance
from sim.calibration.profile_writer import write_profile
from sim.calibration.table_fit import errors_text, fit_table, step_errors
from sim.calibration.timed_steps import TimedStep

WARM_UP_ROUNDS = 1
REQUEST_OVERHEAD_NS = 0
"""What a request needs on its way through a server cannot be measured without one."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """One measurement. ``device_profile`` names the profile whose device sheet the new one takes over."""

    model: str
    backend: str
    device_profile: str
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 65536
    request_tokens_max: int = 1024
    case_tokens_max: int = 4096
    num_threads: int = 0
    rounds: int = 3
    seed: int = 0


def measure_steps(options: MeasureOptions, *, tell_progress: bool = False) -> list[TimedStep]:
    """Run all cases on an executor of its own. Raises ValueError or RuntimeError where that cannot run."""
    settings = executor_settings(options)
    probe = probe_range(settings.instance, options.request_tokens_max, options.case_tokens_max)
    cases = probe_cases(probe, options.rounds, options.seed)
    steps: list[TimedStep] = []
    with ProbedInstance(settings, options.seed) as instance:
        for case in probe_cases(probe, WARM_UP_ROUNDS, options.seed + 1)[: len(cases) // (4 * options.rounds)]:
            instance.run(case)
        for index, case in enumerate(cases):
            steps += _told(index, len(cases), case, instance) if tell_progress else instance.run(case)
    return steps


def executor_settings(options: MeasureOptions) -> ExecutorSettings:
    """The instance that is measured. No prefix is found twice: every step computes all that it says."""
    block_size = 16
    return ExecutorSettings(
        instance=InstanceConfig(
            instance_id=InstanceId("probed"),
            num_blocks=options.kv_tokens // block_size,
            block_size=block_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            prefix_caching=False,
            repeat_max=1,
        ),
        model=options.model,
        backend=options.backend,
        load_format="dummy",
        seed=options.seed,
        num_threads=options.num_threads,
    )


def fitted_profile(options: MeasureOptions, steps: list[TimedStep]) -> FittedProfile:
    """Raises ValueError where the steps are too few, or model or device profile are not known."""
    table = fit_table(steps)
    measurement = Measurement(
        model=options.model,
        backend=options.backend,
        device_profile=options.device_profile,
        num_threads=options.num_threads,
        source="python -m sim.calibration measure: steps of the executor, two in flight, without a server",
        fit_error=errors_text(step_errors(table, steps)),
        notes=(f"{len(steps)} steps",),
    )
    return measured_profile(measurement, table, REQUEST_OVERHEAD_NS)


def add_measure_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's options; it is run through ``run``."""
    parser = commands.add_parser("measure", help="time an executor's steps here, and fit a profile to them")
    parser.set_defaults(run=_measure)
    parser.add_argument("--model", required=True, help="a known model, or a config.json; its weights are random")
    parser.add_argument("--backend", default="cpu", help="what runs it (default: cpu)")
    parser.add_argument(
        "--device-profile", metavar="NAME", help="whose device sheet to take over (default: <backend>/spec)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PROFILE", help="the profile to write")
    for name, meaning in (
        ("max-num-seqs", "of a step, as in the cluster file"),
        ("max-num-batched-tokens", "of a step, as in the cluster file"),
        ("kv-tokens", "KV tokens of the measured instance"),
        ("request-tokens-max", "the longest request that the fit is to hold for"),
        ("case-tokens-max", "prompt tokens of one case: bounds the time that large batches take"),
        ("num-threads", "of the CPU backend; 0: as torch likes"),
        ("rounds", "how many times each kind of step is measured"),
        ("seed", "of the order and of the weights"),
    ):
        field = name.replace("-", "_")
        default = MeasureOptions.__dataclass_fields__[field].default
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")


def measure_options(options: argparse.Namespace) -> MeasureOptions:
    names = [name for name in MeasureOptions.__dataclass_fields__ if name != "device_profile"]
    device_profile = options.device_profile or f"{options.backend}/spec"
    return MeasureOptions(**{name: getattr(options, name) for name in names}, device_profile=device_profile)


def _measure(namespace: argparse.Namespace) -> None:
    options = measure_options(namespace)
    try:
        load_profile(options.device_profile)
        steps = measure_steps(options, tell_progress=True)
    except (BackendError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    profile = fitted_profile(options, steps)
    write_profile(profile, namespace.out)
    for errors in step_errors(profile.table, steps):
        print(
            f"{errors.kind:<8}{errors.num_steps:>7} steps, price against time: median {errors.median:+.1%}, "
            f"|error| p50 {errors.median_absolute:.1%}, p90 {errors.p90_absolute:.1%}"
        )
    core_us = sorted(step.core_us for step in steps)
    print(f"core     {core_us[len(core_us) // 2]:.0f} us a step (median)")
    print(f"wrote {namespace.out}")


def _told(index: int, number: int, case: Case, instance: ProbedInstance) -> list[TimedStep]:
    started_s = time.perf_counter()
    steps = instance.run(case)
    took_s = time.perf_counter() - started_s
    print(f"case {index + 1}/{number}: {len(case)} requests, {len(steps)} steps, {took_s:.2f} s", file=sys.stderr)
    return steps
