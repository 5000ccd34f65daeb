"""Prices that are planted in an executor are found again, alone and behind a whole server."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_server import planted_executor, planted_server

from backends.profile_files import load_profile, read_profile
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.core.run_metrics import RunMetrics
from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sagellm.cost_model.profile import FittedProfile
from sagellm.cost_model.step_cost import StepFeatures
from sagellm.load_client.endpoint import Endpoint
from sagellm.load_client.replay_on_server import LoadSettings, replay_on_server
from sagellm.models.known_models import load_model
from sim.calibration.__main__ import main
from sim.calibration.measure_command import MeasureOptions, executor_settings
from sim.calibration.probe_design import probe_cases, probe_range
from sim.calibration.probed_instance import ProbedInstance, ProbeError
from sim.calibration.profile_writer import write_profile
from sim.calibration.regression import fit_mean, fit_relative
from sim.calibration.serving_fit import (
    ServedRequest,
    alone_requests,
    fit_serving,
    read_served_requests,
    read_served_steps,
)
from sim.calibration.table_fit import StepShare, fit_table, price_us, serving_share, step_errors, with_serving_share
from sim.calibration.timed_steps import TimedStep
from sim.cluster_file import load_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.generators.generate import generate
from traces.request_trace import Trace

US = 10**9  # femtoseconds
TRUTH = StepPriceTable(
    graph_sizes=(),
    decode_num_seqs=(1, 8),
    decode_base_fs=(900 * US, 1_300 * US),
    decode_context_fs=(US // 5, US // 5),
    mixed_num_tokens=(1, 128),
    mixed_base_fs=(1_000 * US, 4_000 * US),
    mixed_floor_fs=0,
    mixed_seq_fs=20 * US,
    mixed_context_fs=US // 4,
    token_pair_fs=US // 20,
    chunk_context_fs=0,
    host_base_fs=0,
    host_seq_fs=0,
)
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


SHARES = st.builds(StepShare, st.floats(0, 500), st.floats(0, 100), st.floats(0, 50))


@given(sizes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 100)), min_size=30, max_size=60), added=SHARES)
def test_what_serving_adds_is_found(sizes: list[tuple[int, int]], added: StepShare) -> None:
    served = []
    for num_seqs, num_tokens in [(1, 0), (8, 0), (1, 60), (8, 90), (3, 5), *sizes]:
        chunks = ((num_tokens, 0),) if num_tokens or not num_seqs else ()
        features = StepFeatures(num_seqs, 20 * num_seqs, ((max(1, num_tokens), 0),) if chunks else ())
        step = TimedStep(features, 0.0)
        more_us = (
            added.step_us + added.seq_us * step.num_seqs + (added.mixed_token_us * step.num_tokens if chunks else 0)
        )
        served.append(replace(step, device_us=price_us(TabulatedStepCost(TRUTH, "measured", 0), features) + more_us))
    found = TabulatedStepCost(with_serving_share(TRUTH, serving_share(TRUTH, served)), "measured", 0)
    for step in served:
        assert price_us(found, step.features) == pytest.approx(step.device_us, rel=0.02)


def test_a_step_is_not_quicker_for_being_served() -> None:
    model = TabulatedStepCost(TRUTH, "measured", 0)
    served = [TimedStep(f, 0.8 * price_us(model, f)) for f in (StepFeatures(n, 50 * n) for n in range(1, 9))]
    assert serving_share(TRUTH, served) == StepShare(0.0, 0.0, 0.0)


def test_scattered_times_are_fitted_by_their_mean() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 10, 3000).astype(float)
    times = (100 + 20 * sizes) * rng.gamma(4.0, 0.25, len(sizes))  # of mean 1, with a long tail upwards
    rows = [[1.0, size] for size in sizes]
    mean, low = fit_mean(rows, times.tolist()), fit_relative(rows, times.tolist())[0]
    at_5 = 100 + 20 * 5
    assert mean @ [1, 5] == pytest.approx(at_5, rel=0.05)
    assert low @ [1, 5] < 0.9 * at_5


REQUESTS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12)


@given(REQUESTS)
def test_requests_alone_are_those_that_overlap_none(spans: list[tuple[int, int]]) -> None:
    requests = {i: ServedRequest(start, 1.0, 1e3 * length) for i, (start, length) in enumerate(spans)}
    expected = [
        i
        for i, (start, length) in enumerate(spans)
        if not any(
            j != i and other < start + length and start < other + other_length
            for j, (other, other_length) in enumerate(spans)
        )
    ]
    assert sorted(alone_requests(requests)) == expected


def calibration_trace() -> Trace:
    """Six requests one after the other, then more with Poisson arrivals."""
    requests = [
        replace(r, num_prompt_tokens=1 + r.num_prompt_tokens % 90, num_output_tokens=4 + r.num_output_tokens % 20)
        for r in generate("poisson", num_requests=46, seed=5, rate=20).requests
    ]
    alone = [replace(r, arrival_ns=0, previous=i - 1 if i else None) for i, r in enumerate(requests[:6])]
    rest = [replace(r, arrival_ns=r.arrival_ns + 2_000_000_000) for r in requests[6:]]
    return Trace("planted", (*alone, *rest))


def times_ten(table: StepPriceTable) -> StepPriceTable:
    """Steps of some 10 ms, beside which what this machine is otherwise up to is small."""
    longer = {name: tuple(10 * v for v in getattr(table, name)) for name in ("decode_base_fs", "mixed_base_fs")}
    return replace(table, **longer)


def test_a_server_is_predicted_from_its_prices(tmp_path: Path) -> None:
    table, base = times_ten(TRUTH), load_profile("cpu/spec")
    path, log, out = tmp_path / "planted.json", tmp_path / "log.jsonl", tmp_path / "served.json"
    profile = FittedProfile(base.header, base.device, load_model("sagellm/toy"), 1, table, base.memory, 0)
    write_profile(profile, path)
    group = InstanceGroup(str(path), max_num_seqs=8, max_num_batched_tokens=128, kv_tokens=8192)
    cluster, trace = ClusterDescription("planted", "sagellm/toy", (group,)), calibration_trace()
    with planted_server(cluster, table, log) as url:
        served = replay_on_server(LoadSettings(Endpoint(url)), trace)
    steps = read_served_steps(log)
    share = fit_serving(profile, cluster, trace, steps, served_requests(served.metrics), out)
    # The device took what the table says: serving it added nothing but the way of a request.
    assert share.step.step_us + share.step.seq_us < 300
    assert 0 <= share.request_us < 100_000
    written = read_profile(out)
    assert isinstance(written, FittedProfile)
    assert written.request_overhead_ns == round(share.request_us * 1e3)
    assert "serving adds" in written.header.notes[-1]
    text = f"model: sagellm/toy\ninstances:\n  - {{profile: {out}, max_num_seqs: 8, max_num_batched_tokens: 128"
    (tmp_path / "c.yaml").write_text(f"{text}, kv_tokens: 8192}}\n")
    simulated = summarise(replay(load_cluster(str(tmp_path / "c.yaml")), trace).metrics, {})
    measured = summarise(served.metrics, {})
    for name in ("tpot", "e2el"):
        assert getattr(simulated, name).mean_ms == pytest.approx(getattr(measured, name).mean_ms, rel=0.25), name


def served_requests(metrics: RunMetrics) -> dict[int, ServedRequest]:
    return {
        int(request_id): ServedRequest(record.request.arrival_ns / 1e9, record.ttft_ns / 1e6, record.e2el_ns / 1e6)
        for request_id, record in metrics.requests.items()
        if record.ttft_ns is not None and record.e2el_ns is not None
    }


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
    metrics = replay(load_cluster(str(tmp_path / "c.yaml")), calibration_trace()).metrics
    assert summarise(metrics, {}).completed == 46


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


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "request_id,arrival_s,ttft_ms,e2el_ms\nx,1,2,3\n"])
def test_requests_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(content)
    if not content:
        assert read_served_requests(path) == {}
        return
    with pytest.raises(ValueError, match="not what `sagellm replay --requests` writes"):
        read_served_requests(path)


def test_a_log_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_served_steps(tmp_path / "none.jsonl")


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
