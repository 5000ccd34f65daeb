"""Metrics as a fold over the log: the same code for a simulated and a live run.

The fold does constant work for each step in which the batch stays the same, however many requests
are in it: requests that get a token in every step have equal gaps between tokens, so a gap is stored
once with the number of requests that saw it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from struct import pack
from typing import Any

import numpy as np

from sagellm.core.identity import InstanceId, RequestId, TransferId
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

_LAUNCH_COLUMNS = 6
_RETURN_COLUMNS = 2
_PENDING_MAX = 1 << 16


class _Integers:
    """A long column of integers: appended to as a list, kept as an array of eight bytes each."""

    __slots__ = ("pending", "settled")

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.settled: array[int] = array("q")

    def settle(self) -> array[int]:
        """Move what is pending over to the array, at C speed, and give it."""
        self.settled.frombytes(pack(f"{len(self.pending)}q", *self.pending))
        self.pending.clear()
        return self.settled


class _Gaps:
    """Gaps between tokens, each with how many requests saw it.

    Emissions are kept as they come and turned into gaps many at a time, at C speed.
    """

    __slots__ = ("count", "gap_ns", "num_pending", "pending")

    def __init__(self) -> None:
        # (time of the token before the first, times of the tokens, requests that have the first gap, requests)
        self.pending: list[tuple[int, tuple[int, ...], int, int]] = []
        self.num_pending = 0
        self.gap_ns: array[int] = array("q")
        self.count: array[int] = array("q")

    def add(self, last_ns: int, ends_ns: tuple[int, ...], num_first: int, num_requests: int) -> None:
        self.pending.append((last_ns, ends_ns, num_first, num_requests))
        self.num_pending += len(ends_ns)
        if self.num_pending > _PENDING_MAX:
            self.settle()

    def settle(self) -> None:
        """Work out the gaps of what is pending."""
        pending = self.pending
        if not pending:
            return
        lengths = np.array([len(ends_ns) for _, ends_ns, _, _ in pending])
        firsts = np.cumsum(lengths) - lengths
        flat = list(chain.from_iterable([each[1] for each in pending]))
        # Packing is the quickest way from Python's integers to eight bytes each.
        ends = np.frombuffer(pack(f"{len(flat)}q", *flat), np.int64)
        before = np.empty_like(ends)
        before[1:] = ends[:-1]
        before[firsts] = [each[0] for each in pending]
        counts = np.repeat(np.array([each[3] for each in pending], np.int64), lengths)
        counts[firsts] = [each[2] for each in pending]
        is_seen = counts > 0
        self.gap_ns.frombytes((ends - before)[is_seen].tobytes())
        self.count.frombytes(counts[is_seen].tobytes())
        pending.clear()
        self.num_pending = 0


@dataclass(slots=True)
class _Lockstep:
    """The requests that got their last token from the instance's latest emission."""

    request_ids: tuple[RequestId, ...] = ()
    members: frozenset[RequestId] = field(default=frozenset())
    last_ns: int = 0
    num_tokens: int = 0  # that a member got which was there from the start
    joined_at: dict[RequestId, int] = field(default_factory=dict)  # num_tokens when the member came


class MetricsFold:
    """Takes the log record by record; `result` is what it comes to."""

    def __init__(self) -> None:
        self.metrics = RunMetrics()
        self._lockstep: dict[InstanceId, _Lockstep] = {}
        self._transfers: dict[TransferId, TransferRecord] = {}
        self._launches: dict[InstanceId, _Integers] = {}  # a row of `_LAUNCH_COLUMNS` for each step
        self._returns: dict[InstanceId, _Integers] = {}  # end and repetitions of each step
        self._gaps = _Gaps()
        self._num_progressed: dict[InstanceId, int] = {}  # repetitions that the step in flight told of
        self._queued: dict[RequestId, None] = {}
        # What `observe` calls for each kind of record; kinds that are not in it do not matter here.
        self.handlers: dict[type, Callable[[int, Any], None]] = {
            RequestArrived: self._arrived,
            AssignRequest: self._assigned,
            RejectRequest: self._rejected,
            RunStep: self._step_launched,
            StepProgressed: self._step_progressed,
            StepFinished: self._step_finished,
            StepFailed: self._step_failed,
            EmitTokens: self._emitted,
            RequestFinished: self._finished,
            TransferKV: self._transfer_started,
            KVTransferred: self._transfer_ended,
            KVTransferFailed: self._transfer_failed,
        }

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        """Take one record of the log: an event when it was handled, or an effect when it was given.

        A message is observed once, as the effect of its sender.
        """
        handler = self.handlers.get(type(record))
        if handler is not None:
            handler(now_ns, record)

    def _arrived(self, now_ns: int, event: RequestArrived) -> None:
        request = event.request
        self.metrics.requests[request.request_id] = RequestRecord(request)
        self._queued[request.request_id] = None
        self._note_queue_depth(now_ns)

    def _assigned(self, now_ns: int, effect: AssignRequest) -> None:
        self._queued.pop(effect.request.request_id, None)
        self._note_queue_depth(now_ns)

    def _note_queue_depth(self, now_ns: int) -> None:
        metrics = self.metrics
        if metrics.queue_time_ns and metrics.queue_time_ns[-1] == now_ns:
            metrics.queue_depth[-1] = len(self._queued)
        else:
            metrics.queue_time_ns.append(now_ns)
            metrics.queue_depth.append(len(self._queued))

    def _rejected(self, now_ns: int, effect: RejectRequest) -> None:
        self.metrics.requests[effect.request_id].reject_reason = effect.reason
        if self._queued.pop(effect.request_id, 0) is None:
            self._note_queue_depth(now_ns)

    def _step_launched(self, now_ns: int, effect: RunStep) -> None:
        metrics, plan = self.metrics, effect.plan
        num_prefill_tokens = 0
        for chunk in plan.chunks:
            num_prefill_tokens += chunk.num_tokens
            record = metrics.requests[chunk.request_id]
            if record.prefill_instance is None:
                record.prefill_instance = effect.instance_id
                record.first_scheduled_ns = now_ns
                record.num_cached_tokens = chunk.num_computed_tokens
                metrics.num_prompt_tokens_queried += record.request.num_prompt_tokens
                metrics.num_prompt_tokens_hit += chunk.num_computed_tokens
        metrics.num_preemptions += len(plan.preempted_request_ids)
        rows = self._launches.get(effect.instance_id)
        if rows is None:
            rows = self._launches[effect.instance_id] = _Integers()
            self._returns[effect.instance_id] = _Integers()
        rows.pending.extend(
            (
                now_ns,
                effect.num_running,
                effect.num_waiting,
                effect.num_blocks_in_use,
                num_prefill_tokens,
                len(plan.decode_request_ids),
            )
        )

    def _step_progressed(self, now_ns: int, event: StepProgressed) -> None:
        self.metrics.num_steps += len(event.ends_ns)
        self._num_progressed[event.instance_id] = len(event.ends_ns)

    def _step_finished(self, now_ns: int, event: StepFinished) -> None:
        num_ends = len(event.ends_ns)
        self.metrics.num_steps += num_ends
        num_repeats = num_ends + self._num_progressed.pop(event.instance_id, 0)
        self._returns[event.instance_id].pending.extend((event.ends_ns[-1], num_repeats))

    def _step_failed(self, now_ns: int, event: StepFailed) -> None:
        self._returns[event.instance_id].pending.extend((now_ns, self._num_progressed.pop(event.instance_id, 0)))

    def result(self) -> RunMetrics:
        """The metrics so far, with the timelines in columns."""
        self._gaps.settle()
        self.metrics.itl_ns, self.metrics.itl_count = self._gaps.gap_ns, self._gaps.count
        for instance_id, launches in self._launches.items():
            rows, ends = launches.settle(), self._returns[instance_id].settle()
            launched = (rows[i::_LAUNCH_COLUMNS] for i in range(_LAUNCH_COLUMNS))
            returned = (ends[i::_RETURN_COLUMNS] for i in range(_RETURN_COLUMNS))
            self.metrics.timelines[instance_id] = InstanceTimeline(*launched, *returned)
        return self.metrics

    def _emitted(self, now_ns: int, effect: EmitTokens) -> None:
        lockstep = self._lockstep.get(effect.instance_id)
        if lockstep is None:
            lockstep = self._lockstep[effect.instance_id] = _Lockstep()
        ends_ns, request_ids = effect.ends_ns, effect.request_ids
        num_in_lockstep = len(request_ids)
        if request_ids is not lockstep.request_ids:
            num_in_lockstep -= self._change_lockstep(lockstep, effect)
        self._gaps.add(lockstep.last_ns, ends_ns, num_in_lockstep, len(request_ids))
        lockstep.last_ns = ends_ns[-1]
        lockstep.num_tokens += len(ends_ns)

    def _change_lockstep(self, lockstep: _Lockstep, effect: EmitTokens) -> int:
        """Settle who came and who went; how many came."""
        metrics, members = self.metrics, frozenset(effect.request_ids)
        for request_id in lockstep.request_ids:
            if request_id not in members:
                record = metrics.requests[request_id]
                if record.decode_instance == effect.instance_id:
                    record.last_token_ns = lockstep.last_ns
                num_emitted = lockstep.num_tokens - lockstep.joined_at.pop(request_id)
                if record.finish_reason is None:
                    record.num_output_tokens += num_emitted
        num_joined = 0
        first_ns = effect.ends_ns[0]
        for request_id in effect.request_ids:
            if request_id in lockstep.members:
                continue
            num_joined += 1
            lockstep.joined_at[request_id] = lockstep.num_tokens
            record = metrics.requests[request_id]
            if record.first_token_ns is None:
                record.first_token_ns = first_ns
            else:
                self._gaps.add(self._last_token_ns(request_id, record), (first_ns,), 1, 1)
            record.decode_instance = effect.instance_id
        lockstep.request_ids, lockstep.members = effect.request_ids, members
        return num_joined

    def num_emitted(self, request_id: RequestId) -> int:
        """Output tokens of an unfinished request that have gone to its client."""
        record = self.metrics.requests[request_id]
        num_emitted = record.num_output_tokens
        for lockstep in self._lockstep.values():
            if request_id in lockstep.members:
                num_emitted += lockstep.num_tokens - lockstep.joined_at[request_id]
        return num_emitted

    def _last_token_ns(self, request_id: RequestId, record: RequestRecord) -> int:
        """When a request that has tokens got its last one."""
        assert record.decode_instance is not None
        former = self._lockstep[record.decode_instance]
        if request_id in former.members:
            return former.last_ns
        assert record.last_token_ns is not None
        return record.last_token_ns

    def _finished(self, now_ns: int, effect: RequestFinished) -> None:
        record = self.metrics.requests[effect.request_id]
        record.finish_reason = effect.reason
        record.num_output_tokens = effect.num_output_tokens
        if record.first_token_ns is not None:
            record.last_token_ns = self._last_token_ns(effect.request_id, record)

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
