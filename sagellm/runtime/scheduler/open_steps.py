"""Steps that are under way, as the batches that a caller draws and completes.

In ``strict`` and ``hybrid`` mode a step is one batch. In ``time_share`` mode it is up to two, run one
after the other: its chunks, and its decodes. An instance plans its next step when both are back, so
however a caller draws them, prefill and decode take turns and neither starves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RunStep
from sagellm.core.plan import TokenChunk
from sagellm.runtime.scheduler.base import Batch, BatchEntry, BatchPhase
from sagellm.runtime.scheduler.pd_config import PDMode
from sagellm.runtime.scheduler.request_records import RequestRecords


class BlockTables:
    """The block tables of one device, put together from what its plans tell of them."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tables: dict[RequestId, list[int]] = {}

    def extend(self, request_id: RequestId, block_ids: Sequence[int]) -> None:
        self._tables.setdefault(request_id, []).extend(block_ids)

    def table(self, request_id: RequestId, num_tokens: int) -> tuple[int, ...]:
        """The table of a request of which so many tokens are known when its step is planned."""
        block_ids = self._tables[request_id]
        assert len(block_ids) == -(-num_tokens // self._block_size), f"I9: {request_id} has a table of another length"
        return tuple(block_ids)

    def forget(self, request_id: RequestId) -> None:
        """The table begins anew, or the request is gone."""
        self._tables.pop(request_id, None)


@dataclass(slots=True)
class OpenStep:
    """A step of one device. ``batches`` are those still to be drawn, by the phase that they are drawn as."""

    effect: RunStep
    device_id: int
    batches: dict[BatchPhase, Batch]
    drawn: Batch | None = None
    drawn_as: BatchPhase = BatchPhase.MIXED
    token_ids: dict[str, int] = field(default_factory=dict)  # that came out of batches completed so far

    def sampled_token_ids(self) -> tuple[tuple[int, ...], ...]:
        """One tuple for each request that the step gives a token, in the step's order."""
        return tuple((self.token_ids[request_id],) for request_id in self.effect.plan.sampled_request_ids)


class OpenSteps:
    """The step of each device that has one, in the order in which they were planned."""

    def __init__(self, mode: str, device_ids: Mapping[InstanceId, int], roles: Mapping[InstanceId, Role],
                 block_size: int) -> None:  # fmt: skip
        self._mode = mode
        self._device_ids = device_ids
        self._roles = roles
        self._tables = {instance_id: BlockTables(block_size) for instance_id in device_ids}
        self._steps: dict[int, OpenStep] = {}
        self._next_batch = 0

    def add(self, effect: RunStep, records: RequestRecords) -> None:
        """A device was given a step: make its batches."""
        plan, instance_id = effect.plan, effect.instance_id
        device_id = self._device_ids[instance_id]
        tables = self._tables[instance_id]
        for request_id in plan.preempted_request_ids:
            tables.forget(request_id)
        for request_id, block_ids in plan.new_block_ids:
            tables.extend(request_id, block_ids)
        batches: dict[BatchPhase, Batch] = {}
        for phase, decode_ids, chunks in self._split(effect):
            entries = self._entries(instance_id, decode_ids, chunks, records)
            batches[phase] = Batch(self._next_batch, device_id, _content(decode_ids, chunks), entries)
            self._next_batch += 1
        assert device_id not in self._steps, "I9: two steps of one device"
        self._steps[device_id] = OpenStep(effect, device_id, batches)

    def draw(self, phase: BatchPhase, device_id: int | None) -> Batch | None:
        """The batch of that phase that waits longest, of that device or of any; a device runs one at a time."""
        for step in self._steps.values():
            if step.drawn is None and phase in step.batches and device_id in (None, step.device_id):
                step.drawn, step.drawn_as = step.batches.pop(phase), phase
                return step.drawn
        return None

    def drawn(self, batch: Batch) -> OpenStep:
        """The step of a batch that was drawn. Raises ValueError where it is not under way."""
        step = self._steps.get(batch.device_id)
        if step is None or step.drawn is not batch:
            raise ValueError(
                f"batch: {batch.batch_id} of device {batch.device_id}, must be drawn and not yet completed"
            )
        return step

    def complete(self, step: OpenStep, token_ids: Sequence[int]) -> bool:
        """The drawn batch is back; True where that was all of its step, which is closed then."""
        assert step.drawn is not None
        step.token_ids.update(zip(step.drawn.sampled_request_ids, token_ids, strict=True))
        step.drawn = None
        if step.batches:
            return False
        self.close(step)
        return True

    def close(self, step: OpenStep) -> None:
        del self._steps[step.device_id]

    def begin_table(self, instance_id: InstanceId, request_id: RequestId) -> None:
        """The instance reserved blocks for the request, which its next plan will tell of."""
        self._tables[instance_id].forget(request_id)

    def forget_request(self, request_id: RequestId) -> None:
        """The request is over."""
        for tables in self._tables.values():
            tables.forget(request_id)

    def _split(self, effect: RunStep) -> list[tuple[BatchPhase, tuple[RequestId, ...], tuple[TokenChunk, ...]]]:
        decode_ids, chunks = effect.plan.decode_request_ids, effect.plan.chunks
        if self._mode == PDMode.STRICT:
            is_prefill = self._roles[effect.instance_id] is Role.PREFILL
            return [(BatchPhase.PREFILL if is_prefill else BatchPhase.DECODE, decode_ids, chunks)]
        if self._mode == PDMode.TIME_SHARE and decode_ids and chunks:
            return [(BatchPhase.PREFILL, (), chunks), (BatchPhase.DECODE, decode_ids, ())]
        return [(BatchPhase.PREFILL if chunks else BatchPhase.DECODE, decode_ids, chunks)]

    def _entries(
        self,
        instance_id: InstanceId,
        decode_ids: tuple[RequestId, ...],
        chunks: tuple[TokenChunk, ...],
        records: RequestRecords,
    ) -> tuple[BatchEntry, ...]:
        tables = self._tables[instance_id]
        entries: list[BatchEntry] = []
        for request_id in decode_ids:
            record = records[request_id]
            num_computed = record.num_tokens - 1
            table = tables.table(request_id, record.num_tokens)
            entries.append(BatchEntry(request_id, record.token_ids(num_computed, 1), num_computed, True, table))
        for chunk in chunks:
            record = records[chunk.request_id]
            token_ids = record.token_ids(chunk.num_computed_tokens, chunk.num_tokens)
            table = tables.table(chunk.request_id, record.num_tokens)
            entries.append(BatchEntry(chunk.request_id, token_ids, chunk.num_computed_tokens, chunk.samples, table))
        return tuple(entries)


def _content(decode_ids: tuple[RequestId, ...], chunks: tuple[TokenChunk, ...]) -> BatchPhase:
    if decode_ids and chunks:
        return BatchPhase.MIXED
    return BatchPhase.PREFILL if chunks else BatchPhase.DECODE
