"""Whatever order a caller calls in: every request ends once, with the right tokens, and all blocks free."""

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kv_devices import TINY_MODEL, VOCAB_SIZE, KVDevices, expected_output, run_to_end

from sagellm.core.request import FinishReason
from sagellm.runtime.scheduler import PDScheduler, PDSchedulerConfig
from sagellm.runtime.scheduler.base import Batch, KVMigrationTask, Request, RequestStatus

BLOCK_SIZE = 4
_Complete = Callable[[Batch, list[int]], None]


class Interleavings(RuleBasedStateMachine):
    """Small devices, so that batches are full, prompts are cut, prefixes meet and KV runs out."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.aborted: dict[str, None] = {}
        self.batches: list[tuple[Batch, _Complete]] = []
        self.tasks: list[KVMigrationTask] = []
        self.num_failed_batches = 0
        self.devices = KVDevices(BLOCK_SIZE)

    @initialize(
        mode=st.sampled_from(["strict", "time_share", "hybrid"]),
        num_blocks=st.integers(6, 14),
        num_prefill=st.integers(1, 2),
        num_decode=st.integers(1, 2),
        chunk=st.sampled_from([3, 8, 16]),
        num_chunks=st.integers(1, 4),
        num_decodes=st.integers(1, 5),
        prefix_caching=st.booleans(),
        strategy=st.sampled_from(["fifo", "priority", "adaptive"]),
        streamed=st.booleans(),
    )
    def make(
        self,
        mode: str,
        num_blocks: int,
        num_prefill: int,
        num_decode: int,
        chunk: int,
        num_chunks: int,
        num_decodes: int,
        prefix_caching: bool,
        strategy: str,
        streamed: bool,
    ) -> None:
        config = PDSchedulerConfig(
            prefill_device_ids=range(num_prefill),
            decode_device_ids=range(num_prefill, num_prefill + num_decode),
            mode=mode,
            max_prefill_batch_size=num_chunks,
            max_prefill_tokens=16,
            prefill_chunk_size=chunk,
            max_decode_batch_size=num_decodes,
            max_decode_tokens=16 if mode == "strict" else None,
            model=TINY_MODEL,
            kv_bytes_max=num_blocks * BLOCK_SIZE * TINY_MODEL.kv_bytes_per_token,
            block_size=BLOCK_SIZE,
            prefix_caching=prefix_caching,
            strategy=strategy,
            handover_start="streamed" if streamed and mode == "strict" else "at_end",
        )
        self.scheduler = PDScheduler(config)
        self.num_slots = num_blocks * BLOCK_SIZE

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_new_tokens=st.integers(1, 12),
        priority=st.integers(0, 3),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
    )
    def add(self, prompt: list[int], max_new_tokens: int, priority: int, stop_token_ids: list[int]) -> None:
        request = Request(f"r{len(self.requests)}", prompt, max_new_tokens, priority, stop_token_ids)
        self.requests[request.request_id] = request
        self.scheduler.add_request(request)

    @rule(wants_prefill=st.booleans())
    def draw(self, wants_prefill: bool) -> None:
        scheduler = self.scheduler
        batch = scheduler.get_prefill_batch() if wants_prefill else scheduler.get_decode_batch()
        if batch is not None:
            assert 0 < batch.num_tokens <= 16
            assert all(drawn.device_id != batch.device_id for drawn, _ in self.batches), "a device runs one at a time"
            self.batches.append((batch, scheduler.complete_prefill if wants_prefill else scheduler.complete_decode))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        batch, complete = self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1)))
        complete(batch, self.devices.run(batch))

    @precondition(lambda self: self.batches)
    @rule()
    def fail(self) -> None:
        batch, _ = self.batches.pop()
        self.num_failed_batches += 1
        self.devices.spoil(batch)
        self.scheduler.fail_batch(batch, "the device gave nothing")

    @rule()
    def draw_migrations(self) -> None:
        self.tasks += self.scheduler.get_migrations()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), succeeds=st.sampled_from([True, True, False]))
    def close_migration(self, data: st.DataObject, succeeds: bool) -> None:
        task = self.tasks.pop(data.draw(st.integers(0, len(self.tasks) - 1)))
        self.devices.copy(task, spoiled=not succeeds)
        if succeeds:
            self.scheduler.complete_migration(task)
        else:
            self.scheduler.fail_migration(task, "link down")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if self.scheduler.abort_request(request_id):
            self.aborted[request_id] = None

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for batch, complete in self.batches:
            complete(batch, self.devices.run(batch))
        for task in self.tasks:
            self.devices.copy(task)
            self.scheduler.complete_migration(task)
        run_to_end(self.scheduler, self.devices)  # ends with a check that nobody holds a block
        for request in self.requests.values():
            self._check_end(request)
        statistics = self.scheduler.statistics()
        num_ended = statistics.num_completed + statistics.num_aborted + statistics.num_failed + statistics.num_rejected
        assert num_ended == statistics.num_requests == len(self.requests)
        assert self.scheduler.get_migrations() == []
        assert self.scheduler.get_prefill_batch() is self.scheduler.get_decode_batch() is None

    def _check_end(self, request: Request) -> None:
        progress = self.scheduler.get_request(request.request_id)
        output, expected = list(progress.output_token_ids), expected_output(request)
        if progress.status is RequestStatus.REJECTED:
            assert len(request.prompt_token_ids) + request.max_new_tokens > self.num_slots
            assert not output
            return
        assert progress.status is RequestStatus.FINISHED
        match progress.finish_reason:
            case FinishReason.LENGTH | FinishReason.STOP:
                assert output == expected
            case FinishReason.ABORT:
                assert request.request_id in self.aborted
                assert output == expected[: len(output)]
            case _:
                assert self.num_failed_batches >= 3
                assert output == expected[: len(output)]


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
