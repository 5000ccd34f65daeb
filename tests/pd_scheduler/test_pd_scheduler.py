"""The design note's usage to the last token, and one test for each fault of the attempt before this one."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from kv_devices import TINY_MODEL, KVDevices, expected_output, run_to_end

from sagellm.core.request import FinishReason, LatencySLO
from sagellm.models.known_models import load_model
from sagellm.runtime.scheduler import PDScheduler, PDSchedulerConfig
from sagellm.runtime.scheduler.base import Batch, BatchPhase, Request, RequestPriority, RequestStatus

ROOT = Path(__file__).resolve().parents[2]
MODES = ("strict", "time_share", "hybrid")


def make_scheduler(mode: str = "strict", *, num_prefill: int = 1, num_decode: int = 1, **limits: object) -> PDScheduler:
    config = PDSchedulerConfig(
        prefill_device_ids=range(num_prefill),
        decode_device_ids=range(num_prefill, num_prefill + num_decode),
        mode=mode,
        **{"model": TINY_MODEL, "kv_bytes_max": 1 << 19, **limits},  # type: ignore[arg-type]
    )
    return PDScheduler(config)


def make_request(name: str, num_prompt_tokens: int, max_new_tokens: int = 4, **fields: object) -> Request:
    prompt = [hash_of(name, position) for position in range(num_prompt_tokens)]
    return Request(name, prompt, max_new_tokens, **fields)  # type: ignore[arg-type]


def hash_of(name: str, position: int) -> int:
    return Random(f"{name} {position}").randrange(50)


def draw_prefill(scheduler: PDScheduler) -> Batch:
    batch = scheduler.get_prefill_batch()
    assert batch is not None
    return batch


def prefill_all(scheduler: PDScheduler, devices: KVDevices) -> None:
    while (batch := scheduler.get_prefill_batch()) is not None:
        scheduler.complete_prefill(batch, devices.run(batch))


def outputs_of(scheduler: PDScheduler, requests: list[Request]) -> list[list[int]]:
    return [list(scheduler.get_request(request.request_id).output_token_ids) for request in requests]


# --- the note ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_notes_usage_goes_on_to_the_last_token(mode: str) -> None:
    config = PDSchedulerConfig(prefill_device_ids=[0, 1], decode_device_ids=[2, 3, 4, 5], mode=mode)
    assert config.num_blocks == 2**34 // (16 * 2 * 28 * 4 * 128 * 2), "of Qwen2.5-7B: 28 layers, 4 KV heads of 128"
    scheduler = PDScheduler(config)
    request = Request(request_id="req_1", prompt_token_ids=[1, 2, 3])
    scheduler.add_request(request)
    prefill_batch = scheduler.get_prefill_batch()
    decode_batch = scheduler.get_decode_batch()
    assert prefill_batch is not None
    assert decode_batch is None
    assert prefill_batch.request_ids == ("req_1",)
    devices = KVDevices(config.block_size)
    scheduler.complete_prefill(prefill_batch, devices.run(prefill_batch))
    run_to_end(scheduler, devices)
    progress = scheduler.get_request("req_1")
    assert progress.status is RequestStatus.FINISHED
    assert progress.finish_reason is FinishReason.LENGTH
    assert len(progress.output_token_ids) == 256
    assert list(progress.output_token_ids) == expected_output(request)


def test_the_notes_lines_work_as_they_stand_in_a_fresh_interpreter() -> None:
    lines = """
from sagellm.runtime.scheduler import PDScheduler, PDSchedulerConfig
config = PDSchedulerConfig(prefill_device_ids=[0, 1], decode_device_ids=[2, 3, 4, 5])
scheduler = PDScheduler(config)
from sagellm.runtime.scheduler.base import Request
scheduler.add_request(Request(request_id="req_1", prompt_token_ids=[1, 2, 3]))
prefill_batch = scheduler.get_prefill_batch()
decode_batch = scheduler.get_decode_batch()
print(prefill_batch.num_tokens, decode_batch)
"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "3 None\n"


@pytest.mark.parametrize("module", ["step_scheduler", "base", "pd_config", "pd_scheduler"])
def test_any_module_of_the_package_can_be_imported_first(module: str) -> None:
    command = [sys.executable, "-c", f"import sagellm.runtime.scheduler.{module}"]
    subprocess.run(command, cwd=ROOT, check=True)


def test_the_step_scheduler_does_not_load_the_facade() -> None:
    code = (
        "import sys, sagellm.runtime.instance; "
        "print([n for n in sys.modules if n.startswith('sagellm.control_plane') or n.endswith('pd_scheduler')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_example_prints_what_is_beside_it() -> None:
    example = ROOT / "docs" / "examples" / "pd_scheduler.py"
    done = subprocess.run([sys.executable, str(example)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == example.with_suffix(".out").read_text("utf-8")


# --- the faults to beat ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_longer_than_a_batch_is_cut_and_blocks_nobody(mode: str) -> None:
    """5,000 tokens against batches of 4,096: they were never scheduled, nor was anything behind them."""
    scheduler = make_scheduler(mode, prefill_chunk_size=4096)
    long, short = make_request("long", 5_000), make_request("short", 10)
    scheduler.add_request(long)
    scheduler.add_request(short)
    devices = KVDevices(16)
    batches = run_to_end(scheduler, devices)
    sizes = [entry.num_tokens for batch in batches for entry in batch.entries if entry.request_id == "long"]
    assert sizes[:2] == [4096, 904]
    assert outputs_of(scheduler, [long, short]) == [expected_output(long), expected_output(short)]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_says_how_large_its_chunks_are(mode: str) -> None:
    scheduler = make_scheduler(mode, num_prefill=1, num_decode=1, prefill_chunk_size=512)
    request = make_request("r", 1_200, max_new_tokens=2)
    scheduler.add_request(request)
    devices = KVDevices(16)
    chunks = []
    while (batch := scheduler.get_prefill_batch()) is not None:
        (entry,) = batch.entries
        chunks.append((entry.num_computed_tokens, entry.num_tokens, entry.samples))
        assert batch.num_tokens == entry.num_tokens > 0
        start = entry.num_computed_tokens
        assert entry.token_ids == tuple(request.prompt_token_ids)[start : start + entry.num_tokens]
        scheduler.complete_prefill(batch, devices.run(batch))
    assert chunks == [(0, 512, False), (512, 512, False), (1024, 176, True)]


@pytest.mark.parametrize("mode", MODES)
def test_time_and_tokens_advance_when_a_batch_is_completed(mode: str) -> None:
    """Not when it is drawn: then the request has neither a token nor a TTFT."""
    scheduler = make_scheduler(mode)
    scheduler.add_request(make_request("r", 20, max_new_tokens=2), now_ns=1_000)
    batch = scheduler.get_prefill_batch(now_ns=2_000)
    assert batch is not None
    drawn = scheduler.get_request("r")
    assert (drawn.status, drawn.first_token_ns, drawn.output_token_ids) == (RequestStatus.PREFILLING, None, ())
    assert scheduler.get_decode_batch(now_ns=3_000) is None
    scheduler.complete_prefill(batch, [7], now_ns=5_000)
    done = scheduler.get_request("r")
    assert done.output_token_ids == (7,)
    assert done.ttft_ns == 4_000
    assert scheduler.metrics.requests[done.request.request_id].ttft_ns == 4_000  # type: ignore[index]
    assert scheduler.statistics().mean_ttft_ns == 4_000
    for task in scheduler.get_migrations(now_ns=6_000):
        scheduler.complete_migration(task, now_ns=6_500)
    decode = scheduler.get_decode_batch(now_ns=7_000)
    assert decode is not None
    scheduler.complete_decode(decode, [8], now_ns=9_000)
    over = scheduler.get_request("r")
    assert (over.ttft_ns, over.last_token_ns, over.status) == (4_000, 9_000, RequestStatus.FINISHED)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_decodes_only_when_its_last_chunk_is_back(mode: str) -> None:
    scheduler = make_scheduler(mode, prefill_chunk_size=32)
    scheduler.add_request(make_request("r", 64))
    devices = KVDevices(16)
    first = draw_prefill(scheduler)
    scheduler.complete_prefill(first, devices.run(first))
    last = draw_prefill(scheduler)
    assert last.sampled_request_ids == ("r",)
    assert scheduler.get_decode_batch() is None
    assert scheduler.get_migrations() == []


def test_migrations_are_spread_over_the_decode_devices() -> None:
    scheduler = make_scheduler(num_prefill=2, num_decode=4)
    devices = KVDevices(16)
    for index in range(8):
        scheduler.add_request(make_request(f"r{index}", 40))
    prefill_all(scheduler, devices)
    tasks = scheduler.get_migrations()
    targets = [task.target_device_id for task in tasks]
    assert sorted(targets) == [2, 2, 3, 3, 4, 4, 5, 5]
    assert {task.source_device_id for task in tasks} == {0, 1}
    assert scheduler.get_migrations() == [], "each migration is given once"


def test_prefill_is_spread_over_the_prefill_devices() -> None:
    scheduler = make_scheduler(num_prefill=2)
    for index in range(4):
        scheduler.add_request(make_request(f"r{index}", 40))
    batches = [draw_prefill(scheduler), draw_prefill(scheduler)]
    assert sorted(batch.device_id for batch in batches) == [0, 1]
    assert [batch.num_requests for batch in batches] == [2, 2]


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-70B", "facebook/opt-13b"])
def test_the_bytes_of_a_migration_are_those_of_the_model(name: str) -> None:
    model = load_model(name)
    scheduler = make_scheduler(model=name, kv_bytes_max=1 << 30)
    scheduler.add_request(make_request("r", 33))
    prefill_all(scheduler, KVDevices(16))
    (task,) = scheduler.get_migrations()
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    assert task.num_bytes == 3 * 16 * per_token, "three blocks of 16 tokens hold 33"
    assert len(task.source_block_ids) == len(task.target_block_ids) == 3
    scheduler.complete_migration(task)
    assert scheduler.statistics().num_migrated_bytes == task.num_bytes


def test_prefill_is_not_starved_by_decode_in_time_share() -> None:
    """A caller that always asks for decode batches first still gets a prefill batch every other time."""
    scheduler = make_scheduler("time_share", num_prefill=1, num_decode=0, prefill_chunk_size=16, max_prefill_tokens=256)
    devices = KVDevices(16)
    scheduler.add_request(make_request("decodes", 8, max_new_tokens=100))
    prefill_all(scheduler, devices)
    late = make_request("late", 160, max_new_tokens=2)
    scheduler.add_request(late)
    phases: list[BatchPhase] = []
    while scheduler.get_request("late").first_token_ns is None:
        if (batch := scheduler.get_decode_batch()) is not None:
            scheduler.complete_decode(batch, devices.run(batch))
        else:
            batch = draw_prefill(scheduler)
            scheduler.complete_prefill(batch, devices.run(batch))
        phases.append(batch.phase)
    assert phases.count(BatchPhase.PREFILL) == 10
    assert set(phases) == {BatchPhase.PREFILL, BatchPhase.DECODE}
    twice = [pair for pair in pairwise(phases[1:]) if pair[0] is pair[1]]
    assert not twice, "batches of one kind follow each other while the other kind waits"


def test_decode_is_not_starved_by_prefill_in_time_share() -> None:
    scheduler = make_scheduler("time_share", num_prefill=1, num_decode=0, prefill_chunk_size=16, max_prefill_tokens=256)
    devices = KVDevices(16)
    scheduler.add_request(make_request("decodes", 8, max_new_tokens=12))
    prefill_all(scheduler, devices)
    scheduler.add_request(make_request("long", 1_000, max_new_tokens=1))
    num_prefills = 0
    while scheduler.get_request("decodes").status is not RequestStatus.FINISHED:
        if (batch := scheduler.get_prefill_batch()) is not None:
            num_prefills += 1
            scheduler.complete_prefill(batch, devices.run(batch))
        elif (batch := scheduler.get_decode_batch()) is not None:
            scheduler.complete_decode(batch, devices.run(batch))
    assert num_prefills <= 12


def test_time_share_runs_one_batch_of_a_device_at_a_time() -> None:
    scheduler = make_scheduler("time_share", num_prefill=1, num_decode=0)
    devices = KVDevices(16)
    scheduler.add_request(make_request("a", 8, max_new_tokens=9))
    prefill_all(scheduler, devices)
    decode = scheduler.get_decode_batch()
    assert decode is not None
    scheduler.add_request(make_request("b", 8))
    scheduler.complete_decode(decode, devices.run(decode))
    prefill = draw_prefill(scheduler)
    assert scheduler.get_decode_batch() is None, "the device is busy"
    scheduler.complete_prefill(prefill, devices.run(prefill))
    decode = scheduler.get_decode_batch()
    assert decode is not None
    assert (prefill.phase, decode.phase) == (BatchPhase.PREFILL, BatchPhase.DECODE)
    assert (prefill.request_ids, decode.request_ids) == (("b",), ("a",))


def test_hybrid_computes_chunks_and_decodes_in_one_batch() -> None:
    scheduler = make_scheduler("hybrid", num_prefill=1, num_decode=0, prefill_chunk_size=32)
    devices = KVDevices(16)
    scheduler.add_request(make_request("a", 8, max_new_tokens=9))
    prefill_all(scheduler, devices)
    decode = scheduler.get_decode_batch()
    assert decode is not None
    scheduler.add_request(make_request("b", 40))
    scheduler.complete_decode(decode, devices.run(decode))
    mixed = draw_prefill(scheduler)
    assert mixed.phase is BatchPhase.MIXED
    assert {entry.request_id: entry.num_tokens for entry in mixed.entries} == {"a": 1, "b": 32}
    assert mixed.sampled_request_ids == ("a",)


def test_strict_makes_the_tokens_of_a_single_device() -> None:
    requests = [make_request(f"r{index}", 5 + 37 * index, max_new_tokens=6) for index in range(6)]
    for handover_start in ("at_end", "streamed"):
        scheduler = make_scheduler(num_prefill=2, num_decode=3, prefill_chunk_size=48, handover_start=handover_start)
        for request in requests:
            scheduler.add_request(request)
        run_to_end(scheduler, KVDevices(16))
        assert outputs_of(scheduler, requests) == [expected_output(request) for request in requests]


@pytest.mark.parametrize("mode", MODES)
def test_kv_that_outgrows_a_device_preempts_the_newest_and_changes_no_token(mode: str) -> None:
    block_bytes = 4 * TINY_MODEL.kv_bytes_per_token
    limits = {"block_size": 4, "kv_bytes_max": 12 * block_bytes, "prefix_caching": False}
    scheduler = make_scheduler(mode, num_prefill=1, num_decode=1 if mode == "strict" else 0, **limits)
    requests = [make_request(f"r{index}", 10, max_new_tokens=24) for index in range(3)]
    for request in requests:
        scheduler.add_request(request)
    run_to_end(scheduler, KVDevices(4))
    assert outputs_of(scheduler, requests) == [expected_output(request) for request in requests]
    assert scheduler.statistics().num_preemptions > 0


def test_limits_on_a_batch_are_kept_and_reached() -> None:
    scheduler = make_scheduler(
        "hybrid", num_prefill=1, num_decode=0, max_prefill_batch_size=3, max_prefill_tokens=40, prefill_chunk_size=9,
        max_decode_batch_size=5,
    )  # fmt: skip
    requests = [make_request(f"r{index}", 30, max_new_tokens=12) for index in range(12)]
    for request in requests:
        scheduler.add_request(request)
    batches = run_to_end(scheduler, KVDevices(16))
    num_chunks = [sum(not entry.samples or entry.num_computed_tokens < 30 for entry in b.entries) for b in batches]
    assert max(num_chunks) == 3
    assert max(batch.num_requests for batch in batches) == 5
    assert max(entry.num_tokens for batch in batches for entry in batch.entries) == 9
    assert all(batch.num_tokens <= 40 for batch in batches)


# --- order, end and errors ---------------------------------------------------------------------------------


def test_the_urgent_go_first() -> None:
    scheduler = make_scheduler(max_prefill_batch_size=1)
    for name, priority in (("low", RequestPriority.LOW), ("normal", 2), ("urgent", RequestPriority.URGENT)):
        scheduler.add_request(make_request(name, 4096, max_new_tokens=1, priority=priority))
    batches = run_to_end(scheduler, KVDevices(16))
    order = list(dict.fromkeys(request_id for batch in batches for request_id in batch.request_ids))
    assert order == ["urgent", "normal", "low"]


def test_an_slo_takes_effect_under_slo_aware() -> None:
    scheduler = make_scheduler(strategy="slo_aware", max_prefill_batch_size=1)
    scheduler.add_request(make_request("patient", 4096, max_new_tokens=1))
    scheduler.add_request(make_request("hurried", 4096, max_new_tokens=1, slo=LatencySLO(ttft_ns=10**9)))
    assert draw_prefill(scheduler).request_ids == ("hurried",)


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_ends_a_request(mode: str) -> None:
    scheduler = make_scheduler(mode)
    free = expected_output(make_request("r", 20, max_new_tokens=30))
    request = make_request("r", 20, max_new_tokens=30, stop_token_ids=[free[7]])
    scheduler.add_request(request)
    run_to_end(scheduler, KVDevices(16))
    progress = scheduler.get_request("r")
    assert progress.finish_reason is FinishReason.STOP
    assert list(progress.output_token_ids) == expected_output(request) == free[: free.index(free[7]) + 1]


@pytest.mark.parametrize("mode", MODES)
def test_an_aborted_request_ends_once_wherever_it_is(mode: str) -> None:
    """Aborted after each number of calls that it takes to the end."""
    num_ends = 0
    for num_rounds in range(8):
        scheduler, devices = make_scheduler(mode, prefill_chunk_size=16), KVDevices(16)
        scheduler.add_request(make_request("r", 40, max_new_tokens=3))
        for _ in range(num_rounds):
            if (batch := scheduler.get_prefill_batch()) is not None:
                scheduler.complete_prefill(batch, devices.run(batch))
            elif (batch := scheduler.get_decode_batch()) is not None:
                scheduler.complete_decode(batch, devices.run(batch))
            else:
                for task in scheduler.get_migrations():
                    devices.copy(task)
                    scheduler.complete_migration(task)
        was_over = scheduler.get_request("r").status is RequestStatus.FINISHED
        assert scheduler.abort_request("r") is not was_over
        run_to_end(scheduler, devices)
        progress = scheduler.get_request("r")
        num_tokens = len(progress.output_token_ids)
        assert progress.finish_reason is (FinishReason.LENGTH if num_tokens == 3 else FinishReason.ABORT)
        assert list(progress.output_token_ids) == expected_output(progress.request)[:num_tokens]
        assert not scheduler.abort_request("r")
        num_ends += scheduler.statistics().num_aborted
    assert 3 <= num_ends < 8


def test_a_request_that_can_never_fit_is_rejected_with_the_reason() -> None:
    scheduler = make_scheduler(kv_bytes_max=4 * 16 * TINY_MODEL.kv_bytes_per_token)
    scheduler.add_request(make_request("big", 60, max_new_tokens=5))
    scheduler.add_request(make_request("fits", 60, max_new_tokens=4))
    run_to_end(scheduler, KVDevices(16))
    big = scheduler.get_request("big")
    assert big.status is RequestStatus.REJECTED
    assert big.reject_reason is not None
    assert big.reject_reason.startswith("60 prompt + 5 output tokens exceed the KV cache of every instance")
    assert scheduler.get_request("fits").finish_reason is FinishReason.LENGTH
    assert scheduler.statistics().num_rejected == 1


@pytest.mark.parametrize("mode", MODES)
def test_failed_batches_are_computed_again_and_then_given_up(mode: str) -> None:
    scheduler, devices = make_scheduler(mode), KVDevices(16)
    request = make_request("r", 20)
    for num_failures, reason in ((2, FinishReason.LENGTH), (3, FinishReason.ERROR)):
        scheduler = make_scheduler(mode)
        scheduler.add_request(request)
        for _ in range(num_failures):
            batch = draw_prefill(scheduler)
            devices.spoil(batch)
            scheduler.fail_batch(batch, "out of memory")
        run_to_end(scheduler, devices)
        assert scheduler.get_request("r").finish_reason is reason


def test_a_failed_migration_is_tried_again_and_then_goes_elsewhere() -> None:
    scheduler, devices = make_scheduler(num_decode=2), KVDevices(16)
    request = make_request("r", 20)
    scheduler.add_request(request)
    prefill_all(scheduler, devices)
    targets = []
    for _ in range(2):
        (task,) = scheduler.get_migrations()
        devices.copy(task, spoiled=True)
        scheduler.fail_migration(task, "link down")
        targets.append(task.target_device_id)
    assert targets == [1, 1]
    (task,) = scheduler.get_migrations()
    assert task.target_device_id == 2
    devices.copy(task)
    scheduler.complete_migration(task)
    run_to_end(scheduler, devices)
    assert outputs_of(scheduler, [request]) == [expected_output(request)]


def test_where_no_decode_device_can_be_reached_a_request_decodes_where_it_is() -> None:
    scheduler, devices = make_scheduler(), KVDevices(16)
    request = make_request("r", 20)
    scheduler.add_request(request)
    prefill_all(scheduler, devices)
    while tasks := scheduler.get_migrations():
        for task in tasks:
            scheduler.fail_migration(task, "link down")
    batches = run_to_end(scheduler, devices)
    assert {batch.device_id for batch in batches} == {0}
    assert outputs_of(scheduler, [request]) == [expected_output(request)]


def test_equal_prefixes_are_computed_once() -> None:
    scheduler, devices = make_scheduler("hybrid", num_prefill=1, num_decode=0), KVDevices(16)
    first = make_request("first", 64)
    second = Request("second", [*list(first.prompt_token_ids)[:48], 1, 2, 3], 4)
    for request in (first, second):
        scheduler.add_request(request)
        run_to_end(scheduler, devices)
    assert outputs_of(scheduler, [first, second]) == [expected_output(first), expected_output(second)]
    assert scheduler.statistics().num_prefill_tokens == 64 + 3


def test_wrong_calls_say_what_is_wrong_and_change_nothing() -> None:
    scheduler, devices = make_scheduler(), KVDevices(16)
    request = make_request("r", 20)
    scheduler.add_request(request)
    with pytest.raises(ValueError, match="'r', was added before"):
        scheduler.add_request(request)
    with pytest.raises(KeyError, match="'x', must be that of a request that was added"):
        scheduler.abort_request("x")
    with pytest.raises(ValueError, match="device_id: 9, must be one of 0, 1"):
        scheduler.get_prefill_batch(device_id=9)
    batch = draw_prefill(scheduler)
    with pytest.raises(ValueError, match="token_ids: 2 of them, must be 1"):
        scheduler.complete_prefill(batch, [1, 2])
    with pytest.raises(ValueError, match="must be completed by complete_prefill"):
        scheduler.complete_decode(batch, [1])
    with pytest.raises(ValueError, match="now_ns: 0, must be "):
        scheduler.complete_prefill(batch, [1], now_ns=0)
    scheduler.complete_prefill(batch, devices.run(batch))
    with pytest.raises(ValueError, match="must be drawn and not yet completed"):
        scheduler.complete_prefill(batch, [1])
    (task,) = scheduler.get_migrations()
    devices.copy(task)
    with pytest.raises(ValueError, match="now_ns: 0, must be "):
        scheduler.complete_migration(task, now_ns=0)
    scheduler.complete_migration(task)
    with pytest.raises(ValueError, match="must be drawn and not yet completed"):
        scheduler.complete_migration(task)
    run_to_end(scheduler, devices)
    assert outputs_of(scheduler, [request]) == [expected_output(request)]


def test_power_of_two_draws_from_the_source_that_it_is_given() -> None:
    config = PDSchedulerConfig([0, 1, 2], [3, 4], routing="power_of_two", model=TINY_MODEL)
    with pytest.raises(ValueError, match="rng: None, must be a seeded"):
        PDScheduler(config)
    used = set()
    for seed in range(20):
        scheduler = PDScheduler(config, Random(seed))
        scheduler.add_request(make_request("r", 4))
        used.add(draw_prefill(scheduler).device_id)
    assert used == {0, 1}  # of two equals the first wins


BAD_CONFIGS = [
    ({"mode": "lazy"}, "mode: 'lazy', must be one of strict, time_share, hybrid"),
    ({"decode_device_ids": []}, r"decode_device_ids: \[\], must name 1 device or more in mode strict"),
    ({"decode_device_ids": [1, 2]}, "decode_device_ids: 1 is in prefill_device_ids too"),
    ({"prefill_device_ids": [1, 1]}, r"prefill_device_ids: \[1, 1\], must name device 1 once"),
    ({"prefill_device_ids": [-1]}, "prefill_device_ids: -1, must be whole numbers of 0 or more"),
    ({"prefill_chunk_size": 0}, "prefill_chunk_size: 0, must be a whole number of 1 or more"),
    ({"prefill_chunk_size": 9999}, r"max_prefill_tokens: 4096, must be at least prefill_chunk_size \(9999\)"),
    ({"max_prefill_batch_size": 5000}, r"max_prefill_tokens: 4096, must be at least max_prefill_batch_size \(5000\)"),
    ({"max_decode_tokens": 8}, r"max_decode_tokens: 8, must be at least max_decode_batch_size \(256\)"),
    ({"mode": "hybrid", "max_decode_tokens": 512}, "max_decode_tokens: 512, must be left out in mode hybrid"),
    ({"mode": "hybrid", "handover_start": "streamed"}, "handover_start: 'streamed', must be left out in mode hybrid"),
    ({"mode": "time_share", "max_decode_batch_size": 5000}, r"at least max_decode_batch_size \(5000\)"),
    ({"handover_start": "eager"}, "handover_start: 'eager', must be one of at_end, streamed"),
    ({"model": "nobody/knows"}, "model: 'nobody/knows' is no known model"),
    ({"kv_bytes_max": 100}, "kv_bytes_max: 100, must be at least 512, which is one block of 16 tokens of tiny"),
    ({"strategy": "random"}, "strategy: 'random', must be one of fifo, priority, slo_aware, adaptive"),
    ({"routing": "nearest"}, "routing: 'nearest', must be one of round_robin"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS, ids=[str(fields) for fields, _ in BAD_CONFIGS])
def test_bad_configurations_say_what_would_be_right(fields: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"prefill_device_ids": [0, 1], "decode_device_ids": [2], "model": TINY_MODEL}
    with pytest.raises(ValueError, match=message):
        PDScheduler(PDSchedulerConfig(**{**good, **fields}))  # type: ignore[arg-type]


def test_bad_requests_say_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"prompt_token_ids: \[\] of request 'r', must have 1 token or more"):
        Request("r", [])
    with pytest.raises(ValueError, match="max_new_tokens: 0 of request 'r', must be 1 or more"):
        Request("r", [1], 0)
