"""A shadow of one Instance: what it may legally say, kept only from events and effects.

It never looks into the machine, but for `check`. Block tables are built from ``StepPlan.new_block_ids``
as a backend would build them, and each block's content from the steps that came back; so a block that
is given out too early, or named as a hit for another content, is found here.
"""

from dataclasses import dataclass, field

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, RequestId, StepId, TransferId
from sagellm.core.messages import (
    CancelTransfer,
    EmitTokens,
    HandoverFailed,
    HandoverFinished,
    InstanceEffect,
    KVReserved,
    PrefillFinished,
    ReleaseKV,
    RequestFinished,
    RequestMoved,
    RunStep,
    TransferKV,
)
from sagellm.core.request import FinishReason, RequestSpec

Content = tuple[str, tuple[int, ...]]  # the salt, and all tokens up to the end of the block


@dataclass
class ShadowRequest:
    """One request as a client and a backend see it."""

    spec: RequestSpec
    hand_over: bool
    tokens: list[int] | None  # prompt and output; None where they are symbolic
    num_emitted: int
    num_planned: int = 0  # tokens computed once all committed executions are back
    num_returned: int = 0  # tokens computed by steps that are back
    epoch: int = 0  # moves when its KV is given up
    table: list[BlockId] = field(default_factory=list)
    announced: bool = False
    ended: FinishReason | None = None
    moved: bool = False
    aborted: bool = False
    last_end_ns: int = 0
    attempt: int = 0  # of the latest hand-over
    prefill_target: int = 0
    reserved: KVReserved | None = None  # the answer to its reservation, where its KV came from a peer
    num_failures: int = 0

    @property
    def is_here(self) -> bool:
        return self.ended is None and not self.moved


@dataclass
class ShadowStep:
    step: RunStep
    epochs: dict[RequestId, int]
    first_tokens: dict[RequestId, int]  # tokens computed before the step, at launch
    touches: set[BlockId]
    num_committed: int = 1
    num_returned: int = 0
    progressed: bool = False
    void: bool = False


@dataclass
class Outgoing:
    """A hand-over in which the machine is the source: what its peer was told and gave."""

    reserved: KVReserved
    closed: bool = False  # by ReleaseKV or HandoverFinished
    failed: bool = False


@dataclass
class Incoming:
    """A hand-over in which the machine is the target."""

    spec: RequestSpec
    attempt: int
    num_output_tokens: int
    answer: KVReserved | None = None


class InstanceShadow:
    """See the module. Rules tell it what was handled; `observe` takes what a poll gave."""

    def __init__(self, config: InstanceConfig) -> None:
        self.config = config
        self.requests: dict[RequestId, ShadowRequest] = {}
        self.steps: list[ShadowStep] = []
        self.transfers: dict[TransferId, TransferKV] = {}
        self.outgoing: dict[tuple[RequestId, int], Outgoing] = {}
        self.incoming: dict[RequestId, Incoming] = {}
        self.content: dict[BlockId, Content | None] = {}
        # What the device gave, by step: the times and each request's tokens, of returns not yet emitted.
        self.given: dict[StepId, list[tuple[tuple[int, ...], dict[RequestId, tuple[int, ...]]]]] = {}
        self.unchecked: list[KVReserved] = []  # reserved since the last plan
        self.used_steps: set[StepId] = set()
        self.used_transfers: set[TransferId] = set()
        self.waits_for_answer: list[RequestId] = []  # announced, with hand_over: the control plane must act
        self.events: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.events[what] = self.events.get(what, 0) + 1

    # --- what the world did -------------------------------------------------------------------------

    def step_returned(self, num_ends: int, *, closes: bool) -> None:
        record = self.steps[0]
        record.num_returned += num_ends
        committed = max(record.num_committed, record.num_returned if closes else record.num_returned + 1)
        for request_id in record.step.plan.decode_request_ids:
            request = self.requests[request_id]
            if request.epoch == record.epochs[request_id]:
                request.num_planned += committed - record.num_committed
        record.num_committed = committed
        record.progressed = not closes
        if not record.void:
            self._computed(record, num_ends)
        if closes:
            self.steps.pop(0)

    def _computed(self, record: ShadowStep, num_ends: int) -> None:
        if not num_ends:
            return
        plan = record.step.plan
        for chunk in plan.chunks:
            self._reach(record, chunk.request_id, chunk.num_computed_tokens + chunk.num_tokens)
        for request_id in plan.decode_request_ids:
            self._reach(record, request_id, record.first_tokens[request_id] + record.num_returned)

    def _reach(self, record: ShadowStep, request_id: RequestId, num_computed: int) -> None:
        request = self.requests[request_id]
        if request.epoch == record.epochs[request_id] and request.is_here:
            request.num_returned = num_computed

    def step_failed(self) -> None:
        failed = self.steps.pop(0)
        if not failed.void:
            for request_id in failed.step.plan.num_tokens_by_request():
                self.requests[request_id].num_failures += 1
        for later in self.steps:
            later.void = True

    def settle_content(self) -> None:
        """After tokens went out: full blocks that steps have computed have a content now."""
        for request in self.requests.values():
            if request.tokens is None or not request.is_here:
                continue
            size = self.config.block_size
            num_known = min(request.num_returned, len(request.tokens))
            for index in range(min(num_known // size, len(request.table))):
                content = (request.spec.cache_salt, tuple(request.tokens[: (index + 1) * size]))
                if self.content[request.table[index]] is None:
                    self.content[request.table[index]] = content

    def kv_arrived(self, answer: KVReserved, request: ShadowRequest, num_computed: int) -> None:
        """A peer has written these blocks."""
        size = self.config.block_size
        for index, block_id in enumerate(answer.block_ids, start=answer.first_block_index):
            if request.tokens is not None and (index + 1) * size <= num_computed:
                self.content[block_id] = (request.spec.cache_salt, tuple(request.tokens[: (index + 1) * size]))

    # --- what a poll gave ----------------------------------------------------------------------------

    def observe(self, effects: tuple[InstanceEffect, ...]) -> None:
        self.settle_content()
        for effect in effects:
            self.count(type(effect).__name__)
            match effect:
                case EmitTokens():
                    self._emitted(effect)
                    self.settle_content()
                case RunStep():
                    self._launched(effect)
                case RequestFinished():
                    self._finished(effect)
                case PrefillFinished(request_id=request_id):
                    request = self.requests[request_id]
                    assert request.is_here
                    assert not request.announced, "announced twice"
                    assert request.num_emitted >= 1
                    request.announced = True
                    if request.hand_over:
                        self.waits_for_answer.append(request_id)
                case TransferKV():
                    self._transfer_started(effect)
                case CancelTransfer(transfer_id=transfer_id):
                    assert transfer_id in self.used_transfers, "a transfer is cancelled that never began"
                case KVReserved():
                    self._reserved(effect)
                case ReleaseKV():
                    self._close_outgoing(effect.request_id, effect.attempt)
                case HandoverFailed():
                    self._handover_failed(effect)
                case HandoverFinished():
                    self._handover_finished(effect)
                case RequestMoved(request_id=request_id):
                    request = self.requests[request_id]
                    assert request.is_here
                    request.moved = True

    def _emitted(self, effect: EmitTokens) -> None:
        assert effect.request_ids
        assert effect.ends_ns
        assert list(effect.ends_ns) == sorted(effect.ends_ns)
        given = self._given(effect)
        for index, request_id in enumerate(effect.request_ids):
            request = self.requests[request_id]
            assert request.is_here, "I3: a token for a request that is not here"
            assert effect.ends_ns[0] >= request.last_end_ns, "I5: an earlier token came later"
            request.last_end_ns = effect.ends_ns[-1]
            if effect.token_ids is None:
                request.num_emitted += len(effect.ends_ns)
            else:
                self._take_tokens(request, effect.token_ids[index], given[request_id])
            assert request.num_emitted <= request.spec.max_output_tokens, "I5: more tokens than asked for"

    def _given(self, effect: EmitTokens) -> dict[RequestId, tuple[int, ...]]:
        """What the device gave in the return that this emission is of; each return is emitted once."""
        returns = self.given[effect.step_id]
        while returns:
            ends_ns, tokens = returns.pop(0)
            if ends_ns == effect.ends_ns:
                return tokens
        raise AssertionError(f"I5: step {effect.step_id} did not end at {effect.ends_ns}, or that was told before")

    def _take_tokens(self, request: ShadowRequest, emitted: tuple[int, ...], given: tuple[int, ...]) -> None:
        stop_ids = request.spec.stop_token_ids
        num_kept = next((i + 1 for i, token in enumerate(given) if token in stop_ids), len(given))
        assert emitted == given[:num_kept], "I5: other tokens than the device gave"
        request.num_emitted += len(emitted)
        assert request.tokens is not None
        request.tokens += emitted

    def _finished(self, effect: RequestFinished) -> None:
        request = self.requests[effect.request_id]
        assert request.is_here, "I3: a second end"
        assert effect.num_output_tokens == request.num_emitted, "I5: miscounted"
        match effect.reason:
            case FinishReason.LENGTH:
                assert request.num_emitted == request.spec.max_output_tokens
            case FinishReason.STOP:
                assert request.tokens is not None
                assert request.tokens[-1] in request.spec.stop_token_ids
            case FinishReason.ABORT:
                assert request.aborted
            case FinishReason.ERROR:
                assert request.num_failures >= self.config.step_attempts_max
        request.ended = effect.reason
        self.count(f"ended: {effect.reason}")

    # --- steps -----------------------------------------------------------------------------------------

    def _launched(self, step: RunStep) -> None:
        plan, config = step.plan, self.config
        assert step.step_id not in self.used_steps
        self.used_steps.add(step.step_id)
        assert len(self.steps) < config.steps_in_flight_max
        assert 0 < plan.num_tokens <= config.max_num_batched_tokens, "I6: token budget"
        assert plan.num_seqs <= config.max_num_seqs, "I6: max_num_seqs"
        assert len(plan.chunks) <= (config.max_num_chunks or config.max_num_seqs), "I6: max_num_chunks"
        chunk_tokens_max = config.max_chunk_tokens or config.max_num_batched_tokens
        assert all(chunk.num_tokens <= chunk_tokens_max for chunk in plan.chunks), "I6: max_chunk_tokens"
        assert len(plan.num_tokens_by_request()) == plan.num_seqs, "a request twice in one step"
        assert step.num_running <= config.max_num_seqs, "I6: max_num_seqs"
        assert step.num_blocks_in_use <= config.num_blocks, "I6: blocks"
        for request_id in plan.preempted_request_ids:
            self._forget_table(request_id)
            self.count("preempted")
        for answer in self.unchecked:
            for block_id in answer.block_ids:
                self._check_unowned(self.requests[answer.request_id], block_id)
        self.unchecked.clear()
        untouchable = self.touched_blocks()
        hits = {chunk.request_id: chunk.num_computed_tokens // config.block_size for chunk in plan.chunks}
        for request_id, block_ids in plan.new_block_ids:
            self._extend_table(request_id, block_ids, hits.get(request_id, 0), untouchable)
        self.steps.append(self._record(step))

    def _forget_table(self, request_id: RequestId) -> None:
        request = self.requests[request_id]
        request.table, request.num_planned, request.num_returned = [], 0, 0
        request.prefill_target = 0
        request.reserved = None
        request.epoch += 1

    def _extend_table(
        self, request_id: RequestId, block_ids: tuple[BlockId, ...], num_hits: int, untouchable: set[BlockId]
    ) -> None:
        request = self.requests.get(request_id)
        assert request is not None, "blocks for a request that was never here"
        assert request.is_here, "I1: blocks for a request that has ended"
        reserved = request.reserved
        for block_id in block_ids:
            index = len(request.table)
            assert 0 <= block_id < self.config.num_blocks
            assert block_id not in request.table, "I2: a block twice in one table"
            request.table.append(block_id)
            if reserved is not None and index >= reserved.first_block_index:
                offset = index - reserved.first_block_index
                if offset < len(reserved.block_ids):
                    assert block_id == reserved.block_ids[offset], "I4: another block than was reserved"
                    continue
            if index < num_hits or (reserved is not None and index < reserved.first_block_index):
                self._check_hit(request, index, block_id)
                self.count("hit")
            else:
                assert block_id not in untouchable, f"I11: block {block_id} is given out while something may touch it"
                self._check_unowned(request, block_id)
                self.content[block_id] = None

    def _check_hit(self, request: ShadowRequest, index: int, block_id: BlockId) -> None:
        assert request.tokens is not None, "I4: a hit for a prompt without identity"
        self.settle_content()
        expected = (request.spec.cache_salt, tuple(request.tokens[: (index + 1) * self.config.block_size]))
        assert self.content.get(block_id) == expected, f"I4: block {block_id} holds something else"

    def _check_unowned(self, owner: ShadowRequest, block_id: BlockId) -> None:
        for request in self.requests.values():
            assert request is owner or not request.is_here or block_id not in request.table, "I2: two owners"

    def _record(self, step: RunStep) -> ShadowStep:
        plan, size = step.plan, self.config.block_size
        first_tokens: dict[RequestId, int] = {}
        touches: set[BlockId] = set()
        for chunk in plan.chunks:
            request = self.requests[chunk.request_id]
            if request.num_planned == 0:
                request.num_planned = request.num_returned = chunk.num_computed_tokens
            assert chunk.num_computed_tokens == request.num_planned, "a chunk does not go on where the last one ended"
            request.num_planned += chunk.num_tokens
            known = request.prefill_target or request.spec.num_prompt_tokens + request.num_emitted
            request.prefill_target = known
            assert chunk.samples == (request.num_planned == known)
            assert request.num_planned <= known
        for request_id in plan.decode_request_ids:
            request = self.requests[request_id]
            first_tokens[request_id] = request.num_planned
            request.num_planned += 1
        assert plan.num_decode_context_tokens == sum(first_tokens.values()), "context tokens are miscounted"
        for request_id in plan.num_tokens_by_request():
            request = self.requests[request_id]
            assert request.is_here, "a step names a request that has ended"
            assert len(request.table) * size >= request.num_planned, "a step writes beyond its table"
            touches.update(request.table)
        epochs = {request_id: self.requests[request_id].epoch for request_id in plan.num_tokens_by_request()}
        return ShadowStep(step, epochs, first_tokens, touches)

    def touched_blocks(self) -> set[BlockId]:
        """Blocks that a step in flight, a transfer or a peer may read or write."""
        touched: set[BlockId] = set()
        for record in self.steps:
            touched |= record.touches
        for transfer in self.transfers.values():
            touched.update(transfer.source_block_ids)
        for incoming in self.incoming.values():
            if incoming.answer is not None:
                touched.update(incoming.answer.block_ids)
        return touched

    # --- hand-overs ------------------------------------------------------------------------------------

    def _reserved(self, answer: KVReserved) -> None:
        incoming = self.incoming[answer.request_id]
        assert incoming.answer is None
        assert incoming.attempt == answer.attempt
        untouchable, size = self.touched_blocks(), self.config.block_size
        request = self.requests[answer.request_id]
        num_blocks = -(-(incoming.spec.num_prompt_tokens + incoming.num_output_tokens) // size)
        assert answer.first_block_index + len(answer.block_ids) == num_blocks, "room for another number of tokens"
        for block_id in answer.block_ids:
            assert block_id not in untouchable, "I11: reserved while something may touch it"
            self.content[block_id] = None
        incoming.answer = request.reserved = answer
        # Requests that lost their blocks in the meantime are named by the next plan only.
        self.unchecked.append(answer)

    def _transfer_started(self, transfer: TransferKV) -> None:
        assert transfer.transfer_id not in self.used_transfers
        self.used_transfers.add(transfer.transfer_id)
        self.transfers[transfer.transfer_id] = transfer
        request, size = self.requests[transfer.request_id], self.config.block_size
        assert request.is_here
        assert len(transfer.source_block_ids) == len(transfer.target_block_ids) > 0, "I4: blocks do not pair"
        assert transfer.num_bytes == len(transfer.source_block_ids) * size * self.config.kv_bytes_per_token
        outgoing = [o for o in self.outgoing.values() if o.reserved.request_id == transfer.request_id and not o.closed]
        target = next(o.reserved for o in outgoing if o.reserved.target_instance_id == transfer.target_instance_id)
        for source, destination in zip(transfer.source_block_ids, transfer.target_block_ids, strict=True):
            index = request.table.index(source)
            assert target.block_ids[index - target.first_block_index] == destination, "I4: sent to a wrong place"
            num_needed = min((index + 1) * size, request.spec.num_prompt_tokens)
            assert request.num_returned >= num_needed, "I4: a block is sent before it was computed"

    def _close_outgoing(self, request_id: RequestId, attempt: int) -> None:
        outgoing = self.outgoing[request_id, attempt]
        assert not outgoing.closed, "a reservation is closed twice"
        outgoing.closed = True
        for transfer in self.transfers.values():
            is_same = transfer.request_id == request_id
            assert not (is_same and set(transfer.target_block_ids) & set(outgoing.reserved.block_ids)), (
                "I11: a target is released while a transfer writes to it"
            )

    def _handover_failed(self, effect: HandoverFailed) -> None:
        outgoing = self.outgoing[effect.request_id, effect.attempt]
        assert outgoing.closed
        assert self.requests[effect.request_id].is_here
        outgoing.failed = True
        self.waits_for_answer.append(effect.request_id)

    def _handover_finished(self, effect: HandoverFinished) -> None:
        self._close_outgoing(effect.request_id, effect.attempt)
        request = self.requests[effect.request_id]
        assert effect.num_output_tokens == request.num_emitted, "I5: tokens lost or doubled in a hand-over"
        assert effect.num_computed_tokens == request.spec.num_prompt_tokens + request.num_emitted - 1
        if effect.output_token_ids is not None:
            assert request.tokens is not None
            assert list(effect.output_token_ids) == request.tokens[request.spec.num_prompt_tokens :]
