"""A server's log gives back the prices planted in its device, and what it does with requests it has not seen."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_server import TRUTH, planted_server

from backends.profile_files import load_profile, read_profile
from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.log import HandledEvent, Polled
from sagellm.core.messages import AssignRequest, EmitTokens, RequestArrived, RunStep, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.core.request import RequestSpec
from sagellm.core.run_metrics import RunMetrics
from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sagellm.cost_model.profile import FittedProfile
from sagellm.cost_model.step_cost import StepFeatures
from sagellm.load_client.endpoint import Endpoint
from sagellm.load_client.replay_on_server import LoadSettings, replay_on_server
from sagellm.models.known_models import load_model
from sim.calibration.__main__ import main
from sim.calibration.profile_writer import write_profile
from sim.calibration.served_log import LoggedReplay, LoggedRequest, read_replays, replays_of
from sim.calibration.serving_fit import ServedReplay, fit_serving, read_client_ttft_ms, time_ratio
from sim.calibration.table_fit import price_us
from sim.calibration.timed_steps import TimedStep
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.generators.generate import generate
from traces.request_trace import Trace

ID = InstanceId("one")


def some_trace(seed: int, num_requests: int) -> Trace:
    trace = generate("poisson", num_requests=num_requests, seed=seed, rate=12)
    requests = [
        replace(r, num_prompt_tokens=1 + r.num_prompt_tokens % 90, num_output_tokens=4 + r.num_output_tokens % 20)
        for r in trace.requests
    ]
    return replace(trace, requests=tuple(requests))


def times_ten(table: StepPriceTable) -> StepPriceTable:
    """Steps of some 10 ms, beside which what this machine is otherwise up to is small."""
    longer = {name: tuple(10 * v for v in getattr(table, name)) for name in ("decode_base_fs", "mixed_base_fs")}
    return replace(table, **longer)


def client_ttft_ms(metrics: RunMetrics) -> dict[int, float]:
    return {int(i): record.ttft_ns / 1e6 for i, record in metrics.requests.items() if record.ttft_ns is not None}


@pytest.mark.parametrize("plan_lead_ns", [0, 3_000_000])
def test_a_server_is_predicted_from_its_log(tmp_path: Path, plan_lead_ns: int) -> None:
    table, base = times_ten(TRUTH), load_profile("cpu/spec")
    path, log, out = tmp_path / "planted.json", tmp_path / "log.jsonl", tmp_path / "fitted.json"
    profile = FittedProfile(base.header, base.device, load_model("sagellm/toy"), 1, table, base.memory, 0)
    write_profile(profile, path)
    group = InstanceGroup(
        str(path), max_num_seqs=8, max_num_batched_tokens=128, kv_tokens=8192, plan_lead_ns=plan_lead_ns
    )
    cluster, unseen = ClusterDescription("planted", "sagellm/toy", (group,)), some_trace(2, 40)
    with planted_server(cluster, table, log) as url:
        calibration = replay_on_server(LoadSettings(Endpoint(url), nonce="seen"), some_trace(1, 50))
        served = replay_on_server(LoadSettings(Endpoint(url), nonce="unseen"), unseen)
    logged = read_replays(log)
    assert list(logged) == ["seen", "unseen"]
    assert [len(each.requests) for each in logged.values()] == [50, 40]
    fit = fit_serving([ServedReplay(logged["seen"], client_ttft_ms(calibration.metrics))])
    assert 0 <= fit.request_us < 100_000
    truth, found = (TabulatedStepCost(each, "measured", 0) for each in (table, fit.table))
    for step in logged["unseen"].steps:
        # A device on a busy machine wakes up late, never early.
        assert price_us(found, step.features) == pytest.approx(price_us(truth, step.features), rel=0.25, abs=1_000)
    written = command_writes(log, [calibration.metrics, served.metrics], tmp_path)
    assert written.header.status == "measured"
    both = [ServedReplay(logged["seen"], client_ttft_ms(calibration.metrics))]
    both.append(ServedReplay(logged["unseen"], client_ttft_ms(served.metrics)))
    assert (written.table, written.plan_lead_ns) == (fit_serving(both).table, plan_lead_ns)
    request_ns = round(fit.request_us * 1e3)
    write_profile(replace(profile, table=fit.table, request_overhead_ns=request_ns, plan_lead_ns=plan_lead_ns), out)
    fitted = replace(cluster, instances=(replace(group, profile=str(out), plan_lead_ns=None),))
    assert [each.config.plan_lead_ns for each in build_cluster(fitted).instances] == [plan_lead_ns]
    simulated = summarise(replay(sim_cluster(build_cluster(fitted)), unseen).metrics, {})
    measured = summarise(served.metrics, {})
    for name in ("ttft", "tpot", "e2el"):
        assert getattr(simulated, name).mean_ms == pytest.approx(getattr(measured, name).mean_ms, rel=0.2), name


def command_writes(log: Path, runs: list[RunMetrics], folder: Path) -> FittedProfile:
    """The profile that the command line makes of a log of so many replays."""
    out = folder / "command.json"
    arguments = ["serving", "--model", "sagellm/toy", "--backend", "none", "--device-profile", "cpu/spec"]
    # Given twice, the log has its replays twice; the fit is not to see the second time.
    arguments += ["--log", str(log), "--log", str(log), "--out", str(out)]
    held_back = ["--requests", "-"] * len(runs)
    for index, metrics in enumerate(runs):
        path = folder / f"requests{index}.csv"
        rows = [f"{request},{ttft_ms!r},1" for request, ttft_ms in client_ttft_ms(metrics).items()]
        path.write_text("\n".join(["request_id,ttft_ms,e2el_ms", *rows]))
        arguments += ["--requests", str(path)]
        assert main([*arguments, *held_back]) == (0 if index == len(runs) - 1 else 2), "every replay has its requests"
    profile = read_profile(out)
    assert isinstance(profile, FittedProfile)
    return profile


def run_step(step_id: int, request_id: str) -> RunStep:
    return RunStep(ID, step_id, StepPlan((RequestId(request_id),), 10, (), ()))


@given(
    durations_us=st.lists(st.integers(100, 5_000), min_size=2, max_size=20),
    late_us=st.integers(0, 20_000),
    pause_us=st.integers(1, 10**6),
)
def test_a_late_driver_is_part_of_a_period_but_idleness_is_not(
    durations_us: list[int], late_us: int, pause_us: int
) -> None:
    """One step in flight at a time: each is launched in the turn that hears of the one before it."""
    records: list[HandledEvent | Polled] = []
    now_ns = 10**9
    expected = []
    for step_id, duration_us in enumerate(durations_us):
        idle = step_id == len(durations_us) // 2  # the turn before it launched nothing
        if idle:
            now_ns += pause_us * 1_000
        records.append(Polled(now_ns, ID, (run_step(step_id, "cmpl-replay-a-0-x"),)))
        end_ns = now_ns + duration_us * 1_000
        now_ns = end_ns + late_us * 1_000
        records.append(HandledEvent(now_ns, ID, StepFinished(ID, step_id, (end_ns,), ((1,),))))
        expected.append(duration_us if idle or not step_id else late_us + duration_us)
    (logged,) = replays_of(records).values()
    assert [step.device_us for step in logged.steps] == pytest.approx(expected)


def test_a_step_planned_ahead_counts_from_the_end_before_it() -> None:
    records = [
        Polled(1_000, ID, (run_step(0, "cmpl-replay-a-0-x"),)),
        Polled(2_000, ID, (run_step(1, "cmpl-replay-b-0-x"),)),
        HandledEvent(9_000, ID, StepFinished(ID, 0, (8_000,), ((1,),))),
        HandledEvent(21_000, ID, StepFinished(ID, 1, (20_000,), ((1,),))),
    ]
    replays = replays_of(records)
    assert [step.device_us for step in replays["a"].steps] == [7.0]
    assert [step.device_us for step in replays["b"].steps] == [12.0]


def test_what_a_client_waited_for_beyond_steps_and_queues() -> None:
    """In by 3 ms, held back by the control plane for 50, on the way for 2, computed for 20, out in 5."""
    ms = 10**6
    spec = RequestSpec(RequestId("cmpl-replay-a-7-x"), 0, 10, 10)
    assign = AssignRequest(ID, spec)
    records = [
        HandledEvent(3 * ms, CONTROL_PLANE, RequestArrived(spec)),
        Polled(53 * ms, CONTROL_PLANE, (assign,)),
        HandledEvent(55 * ms, ID, assign),
        Polled(76 * ms, ID, (EmitTokens(ID, 0, (spec.request_id,), (75 * ms,)),)),
        Polled(90 * ms, ID, (EmitTokens(ID, 1, (spec.request_id,), (89 * ms,)),)),
    ]
    replays = replays_of(records)
    assert replays["a"].requests[7] == LoggedRequest(3 * ms, 53 * ms, 55 * ms, 75 * ms, 89 * ms)
    assert ServedReplay(replays["a"], {7: 80.0}).overheads_us() == pytest.approx([3_000 + 2_000 + 5_000])
    assert ServedReplay(replays["a"], {8: 80.0}).overheads_us() == []


@settings(max_examples=15)
@given(factors=st.lists(st.sampled_from((1.0, 1.0, 1.0, 1.2, 9.0)), min_size=40, max_size=80))
def test_rare_long_steps_are_part_of_the_sum(factors: list[float]) -> None:
    """Steps of planted prices, some many times as long, give a table of the same sum."""
    model = TabulatedStepCost(TRUTH, "measured", 0)
    logged = LoggedReplay()
    for index, factor in enumerate(factors):
        num_seqs = 1 + index % 8
        chunks = ((5 + index, 0),) if index % 3 == 0 else ()
        features = StepFeatures(num_seqs, 30 * num_seqs, chunks)
        logged.steps.append(TimedStep(features, factor * price_us(model, features)))
    logged.requests = {i: LoggedRequest(0, 1, 2, 3, 4) for i in range(10)}
    fit = fit_serving([ServedReplay(logged, dict.fromkeys(range(10), 1.0))])
    assert time_ratio(fit.table, logged.steps) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("a,b\n1,2\n", "not what"), ("request_id,ttft_ms,e2el_ms\nx,1,2\n", "not what"), (None, "cannot be read")],
    ids=["other columns", "no number", "no file"],
)
def test_requests_that_are_none(content: str | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_client_ttft_ms(path)


def test_a_log_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_replays(tmp_path / "none.jsonl")


def test_too_few_requests() -> None:
    with pytest.raises(ValueError, match="0 requests are in both"):
        fit_serving([ServedReplay(LoggedReplay(), {})])
