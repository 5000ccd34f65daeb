"""Metrics as a fold over the log: the same code for a simulated and a live run.

The fold does constant work for each step in which the batch stays the same, however many requests
are in it: requests that get a token in every step have equal gaps between tokens, so a gap is stored
once with the number of requests that saw it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, Final

from sagellm.core.ends import end_before_ns, last_end_ns, num_ends
from sagellm.core.identity import InstanceId, RequestId, TransferId
from sagellm.core.integers import Integers
from sagellm.core.messages import (
    AssignRequest,
    Effect,
    EmitTokens,
    Event,
    KVTransferFailed,
    KVTransferred,
    RejectRequest,
    RequestArrived,
    RequestFinished,
    RunStep,
    StepFailed,
    StepFinished,
    StepProgressed,
    TransferKV,
)
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord
from sagellm.core.token_gaps import TokenGaps

_LAUNCH_COLUMNS: Final = 6
_RETURN_COLUMNS: Final = 2


class _InstanceFold:
    """What the log has told of one instance.

    Its latest emission gave a token to each of ``request_ids``: they are in lockstep.
    """

    __slots__ = ("joined_at", "last_ns", "launches", "num_progressed", "num_tokens", "request_ids", "returns")

    def __init__(self) -> None:
        self.launches = Integers()  # a row of `_LAUNCH_COLUMNS` for each step
        self.returns = Integers()  # end and repetitions of each step
        self.num_progressed = 0  # repetitions that the step in flight told of
        self.request_ids: tuple[RequestId, ...] = ()
        self.last_ns = 0
        self.num_tokens = 0  # that a request in lockstep got which was there from the start
        self.joined_at: dict[RequestId, int] = {}  # num_tokens when each of those in lockstep came


class MetricsFold:
    """Takes the log record by record; `result` is what it comes to."""

    def __init__(self) -> None:
        self.metrics = RunMetrics()
        self._instances: dict[InstanceId, _InstanceFold] = {}
        self._transfers: dict[TransferId, TransferRecord] = {}
        self._gaps = TokenGaps()
        self._num_queued = 0
        self._queue_time_ns = Integers()
        self._queue_depth = Integers()
        # What `observe` calls for each kind of record; kinds that are not in it do not matter here.
        self._handlers: dict[type, Callable[[int, Any], None]] = {
            RequestArrived: self.arrived,
            AssignRequest: self.assigned,
            RejectRequest: self._rejected,
            RunStep: self.step_launched,
            StepProgressed: self.step_progressed,
            StepFinished: self.step_finished,
            StepFailed: self._step_failed,
            EmitTokens: self.emitted,
            RequestFinished: self.finished,
            TransferKV: self._transfer_started,
            KVTransferred: self._transfer_ended,
            KVTransferFailed: self._transfer_failed,
        }

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        """Take one record of the log: an event when it was handled, or an effect when it was given.

        A message is observed once, as the effect of its sender.
        """
        handler = self._handlers.get(type(record))
        if handler is not None:
            handler(now_ns, record)

    def arrived(self, now_ns: int, event: RequestArrived) -> None:
        request = event.request
        self.metrics.requests[request.request_id] = RequestRecord(request)
        self._num_queued += 1
        self._note_queue_depth(now_ns)

    def assigned(self, now_ns: int, effect: AssignRequest) -> None:
        record = self.metrics.requests[effect.request.request_id]
        if not record.was_assigned:
            record.was_assigned = True
            self._num_queued -= 1
        self._note_queue_depth(now_ns)

    def _note_queue_depth(self, now_ns: int) -> None:
        times_ns, depths = self._queue_time_ns.pending, self._queue_depth.pending
        if times_ns and times_ns[-1] == now_ns:
            depths[-1] = self._num_queued
        else:
            times_ns.append(now_ns)
            depths.append(self._num_queued)

    def _rejected(self, now_ns: int, effect: RejectRequest) -> None:
        record = self.metrics.requests[effect.request_id]
        record.num_output_tokens = self.num_emitted(effect.request_id)
        record.reject_reason = effect.reason
        if not record.was_assigned:
            self._num_queued -= 1
            self._note_queue_depth(now_ns)

    def step_launched(self, now_ns: int, effect: RunStep) -> None:
        metrics, plan, instance_id = self.metrics, effect.plan, effect.instance_id
        num_prefill_tokens = 0
        for chunk in plan.chunks:
            num_prefill_tokens += chunk.num_tokens
            record = metrics.requests[chunk.request_id]
            if record.prefill_instance is None:
                num_computed_tokens = chunk.num_computed_tokens
                record.prefill_instance = instance_id
                record.first_scheduled_ns = now_ns
                record.num_cached_tokens = num_computed_tokens
                metrics.num_prompt_tokens_queried += record.request.num_prompt_tokens
                metrics.num_prompt_tokens_hit += num_computed_tokens
        metrics.num_preemptions += len(plan.preempted_request_ids)
        self._instance(instance_id).launches.extend(
            (
                now_ns,
                effect.num_running,
                effect.num_waiting,
                effect.num_blocks_in_use,
                num_prefill_tokens,
                len(plan.decode_request_ids),
            )
        )

    def _instance(self, instance_id: InstanceId) -> _InstanceFold:
        instance = self._instances.get(instance_id)
        if instance is None:
            instance = self._instances[instance_id] = _InstanceFold()
        return instance

    def step_progressed(self, now_ns: int, event: StepProgressed) -> None:
        num_new = num_ends(event.ends_ns)
        self.metrics.num_steps += num_new
        self._instance(event.instance_id).num_progressed = num_new

    def step_finished(self, now_ns: int, event: StepFinished) -> None:
        ends_ns = event.ends_ns
        num_new = num_ends(ends_ns)
        self.metrics.num_steps += num_new
        instance = self._instance(event.instance_id)
        instance.returns.extend((last_end_ns(ends_ns), num_new + instance.num_progressed))
        instance.num_progressed = 0

    def _step_failed(self, now_ns: int, event: StepFailed) -> None:
        instance = self._instance(event.instance_id)
        instance.returns.extend((now_ns, instance.num_progressed))
        instance.num_progressed = 0

    def result(self) -> RunMetrics:
        """The metrics so far, with the timelines in columns."""
        metrics = self.metrics
        metrics.itl_ns, metrics.itl_count = self._gaps.result()
        metrics.queue_time_ns, metrics.queue_depth = self._queue_time_ns.to_array(), self._queue_depth.to_array()
        for instance_id, instance in self._instances.items():
            launches, returns = (
                instance.launches.to_table(_LAUNCH_COLUMNS),
                instance.returns.to_table(_RETURN_COLUMNS),
            )
            if len(launches):
                columns = [array("q", column.tobytes()) for column in (*launches.T, *returns.T)]
                metrics.timelines[instance_id] = InstanceTimeline(*columns)
        return metrics

    def emitted(self, now_ns: int, effect: EmitTokens) -> None:
        instance_id, request_ids, ends_ns = effect.instance_id, effect.request_ids, effect.ends_ns
        instance = self._instance(instance_id)
        num_requests = num_in_lockstep = len(request_ids)
        if isinstance(ends_ns, tuple):
            first_ns, last_ns, num_gaps = ends_ns[0], ends_ns[-1], len(ends_ns) - 1
            for index in range(num_gaps):
                self._gaps.add(ends_ns[index + 1] - ends_ns[index], num_requests)
        else:
            last_ns, num_gaps = ends_ns.last_ns, ends_ns.count - 1
            early_fs, period_fs, growth_fs = ends_ns.early_fs, ends_ns.period_fs, ends_ns.growth_fs
            first_ns = end_before_ns(num_gaps, last_ns, early_fs, period_fs, growth_fs)
            self._gaps.add_within(num_requests, num_gaps, early_fs, period_fs, growth_fs)
        if request_ids is not instance.request_ids:
            num_in_lockstep -= self._change_lockstep(instance, instance_id, request_ids, first_ns)
        self._gaps.add(first_ns - instance.last_ns, num_in_lockstep)
        instance.last_ns = last_ns
        instance.num_tokens += num_gaps + 1

    def _change_lockstep(
        self, instance: _InstanceFold, instance_id: InstanceId, request_ids: tuple[RequestId, ...], first_ns: int
    ) -> int:
        """Settle who came and who went; how many came."""
        # Who stays keeps its place before those who come. A request out of that order goes and comes again,
        # which is the same for its times.
        num_staying, num_new = len(instance.request_ids), len(request_ids)
        if request_ids[:num_staying] != instance.request_ids:
            num_staying = 0
            for request_id in instance.request_ids:
                if num_staying < num_new and request_ids[num_staying] == request_id:
                    num_staying += 1
                else:
                    self._leave_lockstep(instance, instance_id, request_id)
        for index in range(num_staying, num_new):
            request_id = request_ids[index]
            record = self.metrics.requests[request_id]
            if record.first_token_ns is None:
                record.first_token_ns = first_ns
            else:
                self._gaps.add(first_ns - self._last_token_ns(request_id, record), 1)
            record.decode_instance = instance_id
            instance.joined_at[request_id] = instance.num_tokens
        instance.request_ids = request_ids
        return num_new - num_staying

    def _leave_lockstep(self, instance: _InstanceFold, instance_id: InstanceId, request_id: RequestId) -> None:
        record = self.metrics.requests[request_id]
        if record.decode_instance == instance_id:
            record.last_token_ns = instance.last_ns
        num_emitted = instance.num_tokens - instance.joined_at.pop(request_id)
        if record.finish_reason is None and record.reject_reason is None:
            record.num_output_tokens += num_emitted

    def num_emitted(self, request_id: RequestId) -> int:
        """Output tokens of an unfinished request that have gone to its client."""
        num_emitted = self.metrics.requests[request_id].num_output_tokens
        for instance in self._instances.values():
            joined_at = instance.joined_at.get(request_id)
            if joined_at is not None:
                num_emitted += instance.num_tokens - joined_at
        return num_emitted

    def _last_token_ns(self, request_id: RequestId, record: RequestRecord) -> int:
        """When a request that has tokens got its last one."""
        assert record.decode_instance is not None
        former = self._instances[record.decode_instance]
        if request_id in former.joined_at:
            return former.last_ns
        assert record.last_token_ns is not None
        return record.last_token_ns

    def finished(self, now_ns: int, effect: RequestFinished) -> None:
        request_id = effect.request_id
        record = self.metrics.requests[request_id]
        record.finish_reason = effect.reason
        record.num_output_tokens = effect.num_output_tokens
        if record.first_token_ns is not None:
            record.last_token_ns = self._last_token_ns(request_id, record)

    def _transfer_started(self, now_ns: int, effect: TransferKV) -> None:
        transfer = TransferRecord(
            effect.request_id, effect.source_instance_id, effect.target_instance_id, effect.num_bytes, start_ns=now_ns
        )
        self._transfers[effect.transfer_id] = transfer
        self.metrics.transfers.append(transfer)

    def _transfer_ended(self, now_ns: int, event: KVTransferred) -> None:
        self._transfers.pop(event.transfer_id).end_ns = now_ns

    def _transfer_failed(self, now_ns: int, event: KVTransferFailed) -> None:
        transfer = self._transfers.pop(event.transfer_id)
        transfer.end_ns, transfer.failed = now_ns, True
