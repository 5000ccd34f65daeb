"""Prices that are planted in an executor are found again."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_server import TRUTH, US, planted_executor

from backends.profile_files import read_profile
from sagellm.cost_model.price_table import TabulatedStepCost
from sagellm.cost_model.profile import FittedProfile
from sagellm.cost_model.step_cost import StepFeatures
from sim.calibration.__main__ import main
from sim.calibration.measure_command import MeasureOptions, executor_settings
from sim.calibration.probe_design import probe_cases, probe_range
from sim.calibration.probed_instance import ProbedInstance, ProbeError
from sim.calibration.regression import fit_mean, fit_relative
from sim.calibration.table_fit import fit_table, price_us, step_errors
from sim.calibration.timed_steps import TimedStep
from sim.cluster_file import load_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.generators.generate import generate

SMALL = MeasureOptions(
    model="sagellm/toy",
    backend="none",
    device_profile="cpu/spec",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    kv_tokens=4096,
    request_tokens_max=200,
    case_tokens_max=400,
    rounds=1,
)


@pytest.fixture(scope="module")
def probed_steps() -> list[TimedStep]:
    """All cases on an executor that takes what the table says, and reports to the nanosecond when it was done."""
    settings = executor_settings(SMALL)
    steps: list[TimedStep] = []
    with ProbedInstance(settings, make=lambda each: planted_executor(each, TRUTH)) as instance:
        probe = probe_range(settings.instance, SMALL.request_tokens_max, SMALL.case_tokens_max)
        for case in probe_cases(probe, SMALL.rounds, seed=1):
            steps += instance.run(case)
    return steps


def test_all_kinds_of_steps_occur(probed_steps: list[TimedStep]) -> None:
    decodes = {step.features.num_decode_seqs for step in probed_steps if not step.features.chunks}
    assert decodes >= {1, 2, 4, 8}
    mixed = [step.features for step in probed_steps if step.features.chunks and step.features.num_decode_seqs]
    prefills = [step.features for step in probed_steps if not step.features.num_decode_seqs]
    assert max(computed for features in prefills for _, computed in features.chunks) > 64
    assert len({sum(num_tokens for num_tokens, _ in features.chunks) for features in mixed}) >= 3
    assert max(step.num_tokens for step in probed_steps) == SMALL.max_num_batched_tokens
    assert all(step.core_us > 0 for step in probed_steps)


def test_planted_prices_are_found(probed_steps: list[TimedStep]) -> None:
    table = fit_table(probed_steps)
    # A step launched on an idle device counts from a moment before the executor's own start: not exactly the price.
    for errors in step_errors(table, probed_steps):
        assert errors.median_absolute < 0.05, errors
    truth, found = (TabulatedStepCost(each, "measured", 0) for each in (TRUTH, table))
    rng = random.Random(4)
    for _ in range(200):
        num_seqs = rng.randrange(0, 8)
        context = num_seqs * rng.randrange(20, 150)
        chunks = ((rng.randrange(4, 56), rng.choice((0, 64, 128))),) if rng.random() < 0.5 or not num_seqs else ()
        features = StepFeatures(num_seqs, context, chunks)
        assert price_us(found, features) == pytest.approx(price_us(truth, features), rel=0.1)
    assert 0 < table.host_base_fs < 5_000 * US


def test_scattered_times_are_fitted_by_their_mean() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 10, 3000).astype(float)
    times = (100 + 20 * sizes) * rng.gamma(4.0, 0.25, len(sizes))  # of mean 1, with a long tail upwards
    rows = [[1.0, size] for size in sizes]
    mean, low = fit_mean(rows, times.tolist()), fit_relative(rows, times.tolist())[0]
    at_5 = 100 + 20 * 5
    assert mean @ [1, 5] == pytest.approx(at_5, rel=0.05)
    assert low @ [1, 5] < 0.9 * at_5


def test_a_profile_of_this_machine_is_measured_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    sizes = ["--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--kv-tokens", "2048", "--rounds", "1"]
    sizes += ["--request-tokens-max", "64", "--case-tokens-max", "64", "--num-threads", "1"]
    assert main(["measure", "--model", "sagellm/toy", "--out", str(out), *sizes]) == 0
    assert "price against time" in capsys.readouterr().out
    profile = read_profile(out)
    assert isinstance(profile, FittedProfile)
    assert profile.header.status == "measured"
    assert min(profile.table.decode_base_fs) > 0
    assert profile.table.host_base_fs > 0
    (tmp_path / "c.yaml").write_text(f"model: sagellm/toy\ninstances:\n  - {{profile: {out}, max_num_seqs: 4}}\n")
    trace = generate("poisson", num_requests=20, seed=5, rate=20)
    short = tuple(replace(request, num_prompt_tokens=9, num_output_tokens=7) for request in trace.requests)
    metrics = replay(load_cluster(str(tmp_path / "c.yaml")), replace(trace, requests=short)).metrics
    assert summarise(metrics, {}).completed == 20


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "no/such"], "no/such"),
        (["--model", "sagellm/toy", "--backend", "abacus", "--device-profile", "cpu/spec"], "abacus"),
        (["--model", "sagellm/toy", "--device-profile", "slate/spec"], "slate/spec"),
    ],
    ids=["model", "backend", "device profile"],
)
def test_what_cannot_be_measured(arguments: list[str], complaint: str, tmp_path: Path, capsys: object) -> None:
    assert main(["measure", *arguments, "--out", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x.json").exists()


def test_an_executor_that_dies_is_not_measured() -> None:
    class Dying:
        def start(self, _on_outcome: object, on_dead: object) -> None:
            self.on_dead = on_dead

        def add_request(self, *_: object) -> None: ...

        def launch(self, _step: object) -> None:
            self.on_dead("smoke")

        def close(self) -> None: ...

    settings = executor_settings(SMALL)
    probe = probe_range(settings.instance, 64, 64)
    with ProbedInstance(settings, make=lambda _: Dying()) as instance, pytest.raises(ProbeError, match="smoke"):
        instance.run(probe_cases(probe, 1, 0)[0])
