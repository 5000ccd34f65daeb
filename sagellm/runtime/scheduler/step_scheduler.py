"""Which tokens of which requests are in the next step.

Running requests come first, in order of admission: a token for each that decodes, then the rest of
prompts that did not fit an earlier step. What is left of the token budget admits waiting requests,
first come, first served; a prompt that does not fit the budget is cut. A step has no phases: all of
it is ``num_computed_tokens`` chasing a target.

A step that finds too few blocks for its decodes preempts the newest request, never the oldest, so
the oldest always ends and somebody always makes progress.
"""

from collections import deque
from typing import Final

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.messages import ReserveKV
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.kv_runtime.kv_cache import KVCache, RequestBlocks
from sagellm.prefix_reuse.radix_index import PrefixMatch
from sagellm.runtime.decode_group import DecodeGroup
from sagellm.runtime.local_request import LocalRequest, RequestState

_NO_CHUNKS: Final[tuple[TokenChunk, ...]] = ()


class StepScheduler:
    """The queues, blocks and step clock of one instance. Plans steps; knows no messages and no time.

    ``planned_clock`` counts executions of steps that are committed to the device; the instance keeps
    the count of those that came back.
    """

    def __init__(self, config: InstanceConfig) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._watermark_blocks = config.watermark_blocks
        self._repeat_max = config.repeat_max
        self._steps_in_flight_max = config.steps_in_flight_max
        self._num_chunks_max = config.max_num_chunks or config.max_num_seqs
        self._chunk_tokens_max = config.max_chunk_tokens or config.max_num_batched_tokens
        self.kv = KVCache(config.num_blocks, config.block_size, config.prefix_caching, config.eviction)
        self.waiting: deque[LocalRequest] = deque()
        self.reservations: deque[ReserveKV] = deque()
        self.prefilling: dict[RequestId, LocalRequest] = {}
        self.decodes = DecodeGroup(config.block_size)
        self.draining: deque[LocalRequest] = deque()  # in order of finish_clock
        self.staying: deque[LocalRequest] = deque()  # prefilled, kept here after all, waiting for a place
        self.num_unreturned = 0  # requests fully planned and not yet back: draining and prefilled
        self.planned_clock = 0
        self._deferred: deque[tuple[int, RequestBlocks]] = deque()  # blocks that a committed step may still touch
        self._new_block_ids: list[tuple[RequestId, tuple[BlockId, ...]]] = []
        self._restarted: list[RequestId] = []  # lost their tables since the last plan
        self.preempted_since: list[LocalRequest] = []  # for the instance to look at after each `plan`
        self._num_admitted = 0
        self.num_receiving = 0

    # --- blocks ---------------------------------------------------------------------------------

    def free_blocks(self, blocks: RequestBlocks, done_clock: int) -> None:
        """Give blocks back, as soon as no committed step can touch them."""
        if done_clock < self.planned_clock:
            self._deferred.append((self.planned_clock, blocks))
        else:
            self.kv.release(blocks)

    def free_deferred(self, done_clock: int) -> None:
        deferred = self._deferred
        while deferred and deferred[0][0] <= done_clock:
            self.kv.release(deferred.popleft()[1])

    def commit(self, num_executions: int) -> None:
        """So many more executions of the plan are committed: every decode needs its next slots.

        Requests for which the last of them is the last of all leave the decodes at once: no later step
        need ever be planned.
        """
        first = self.planned_clock + 1
        self.planned_clock += num_executions
        block_size = self.kv.block_size
        by_growth = self.decodes.by_growth
        for clock in range(first, first + min(num_executions, block_size)):
            growing = by_growth[clock % block_size]
            if growing:
                self._grow(growing, (self.planned_clock - clock) // block_size + 1)
        if self.decodes.members:
            self._drain_fully_planned()

    def _grow(self, growing: dict[RequestId, LocalRequest], num_blocks: int) -> None:
        kv, new_block_ids = self.kv, self._new_block_ids
        for request in growing.values():
            assert request.blocks is not None
            new_block_ids.append((request.request_id, kv.grow(request.blocks, num_blocks)))

    # --- queues ---------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests that count against ``max_num_seqs``."""
        return len(self.decodes.members) + len(self.prefilling) + self.num_unreturned + self.num_receiving

    def join_decodes(self, request: LocalRequest, *, base_computed: int, base_output: int) -> None:
        request.move(RequestState.DECODING)
        self.decodes.join(request, self.planned_clock, base_computed=base_computed, base_output=base_output)

    def remove(self, request: LocalRequest) -> None:
        """Take a request out of whichever queue it stands in."""
        match request.state:
            case RequestState.WAITING:
                self.waiting.remove(request)
            case RequestState.PREFILLING:
                del self.prefilling[request.request_id]
            case RequestState.DECODING:
                self.decodes.leave(request)
            case RequestState.DRAINING:
                self.draining.remove(request)
                self.num_unreturned -= 1
            case RequestState.PREFILLED:
                self.num_unreturned -= 1
            case RequestState.RECEIVING:
                self.num_receiving -= 1
            case RequestState.HANDING_OVER:
                if request in self.staying:
                    self.staying.remove(request)
            case RequestState.ENDED:
                pass

    def requeue(self, request: LocalRequest, num_output_tokens: int, done_clock: int) -> None:
        """Back to the head of the queue, with nothing computed."""
        self.remove(request)
        request.move(RequestState.WAITING)
        if request.blocks is not None:
            self.free_blocks(request.blocks, done_clock)
            request.blocks = None
        self.withdraw_table(request)
        self._restarted.append(request.request_id)
        request.restart(num_output_tokens)
        self.waiting.appendleft(request)

    def withdraw_table(self, request: LocalRequest) -> None:
        """No plan may tell of blocks that the request has given up."""
        if self._new_block_ids:
            request_id = request.request_id
            self._new_block_ids = [entry for entry in self._new_block_ids if entry[0] != request_id]

    def num_returned_output(self, request: LocalRequest, done_clock: int) -> int:
        """Output tokens of the request that have come back."""
        if request.state in (RequestState.DECODING, RequestState.DRAINING):
            return self.decodes.num_returned_output(request, done_clock)
        return request.num_output_tokens

    # --- reservations ---------------------------------------------------------------------------

    def admit_reservation(self) -> tuple[ReserveKV, LocalRequest, int] | None:
        """Reserve blocks for the first hand-over in line, if there is room.

        Gives it, the request, and how many of its blocks are already here in the prefix cache.
        """
        if not self.reservations or self.num_running >= self._max_num_seqs:
            return None
        reservation = self.reservations[0]
        spec = reservation.request
        num_tokens = spec.num_prompt_tokens + reservation.num_output_tokens
        match = self.kv.match(spec)
        if not self._has_room(match, num_tokens):
            return None
        self.reservations.popleft()
        request = LocalRequest(spec, hand_over=False, num_output_tokens=0)
        self._admitted(request)
        request.blocks = self.kv.admit(spec, match, num_tokens)
        request.state = RequestState.RECEIVING
        self.num_receiving += 1
        self._new_block_ids.append((spec.request_id, tuple(request.blocks.block_ids)))
        return reservation, request, request.blocks.num_shared

    def admit_staying(self) -> None:
        """Prefilled requests that no decode instance takes decode here, as places become free."""
        while self.staying and self.num_running < self._max_num_seqs:
            request = self.staying.popleft()
            self.join_decodes(request, base_computed=request.prefill_target, base_output=request.num_output_tokens)

    def _admitted(self, request: LocalRequest) -> None:
        self._num_admitted += 1
        request.sequence = self._num_admitted

    def _has_room(self, match: PrefixMatch | None, num_tokens: int) -> bool:
        # An instance on which nobody holds a block takes any request that fits at all: the control
        # plane rejected those that never fit.
        watermark = self._watermark_blocks if self.kv.num_in_use else 0
        return self.kv.can_admit(match, num_tokens, watermark)

    # --- the plan -------------------------------------------------------------------------------

    def plan(self, done_clock: int) -> StepPlan | None:
        """The next step, committed, or None where there is nothing to do, or no room until some
        committed step or transfer has come back.
        """
        decodes = self.decodes
        num_restarted = len(self._restarted)
        if decodes.growing(self.planned_clock + 1) and not self._make_room_for_decodes(done_clock):
            return None
        preempts = len(self._restarted) > num_restarted
        decode_ids = decodes.request_ids
        num_context_tokens = decodes.num_context_tokens(self.planned_clock)
        self.commit(1)
        chunks: list[TokenChunk] = []
        if self.prefilling or self.waiting:
            budget = self._max_num_batched_tokens - len(decode_ids)
            if self.prefilling:
                budget = self._continue_prefills(chunks, budget)
            if self.waiting and not preempts:
                self._admit_waiting(chunks, budget)
        if chunks:
            self._settle_chunks(chunks)
        elif not decode_ids:
            self.planned_clock -= 1
            return None
        return self._take_plan(decode_ids, num_context_tokens, tuple(chunks) if chunks else _NO_CHUNKS)

    def _take_plan(
        self, decode_ids: tuple[RequestId, ...], num_context_tokens: int, chunks: tuple[TokenChunk, ...]
    ) -> StepPlan:
        new_block_ids = tuple(self._new_block_ids)
        self._new_block_ids.clear()
        if not self._restarted:
            return StepPlan(decode_ids, num_context_tokens, chunks, new_block_ids)
        restarted_ids = tuple(self._restarted)
        self._restarted.clear()
        return StepPlan(decode_ids, num_context_tokens, chunks, new_block_ids, restarted_ids)

    def repetition(self, plan: StepPlan, *, may_change: bool) -> tuple[int, bool]:
        """How often the plan just made can be repeated with the same requests, and whether it ends quietly then.

        ``may_change``: what is under way may make another plan of it. It ends quietly where the step that is due while
        its last execution runs decodes those that are left.
        """
        decodes = self.decodes
        if may_change or plan.chunks or self.prefilling or self._repeat_max == 1:
            return 1, False
        if plan.preempted_request_ids:
            # Who was preempted may have left room for somebody who was looked at before.
            return 1, False
        if self.draining and self.draining[-1].finish_clock == self.planned_clock:
            return 1, False
        if self.num_unreturned > len(self.draining):
            # A prefilled request that comes back may stay here and decode.
            return 1, False
        somebody_waits = bool(self.waiting or self.reservations or self.staying)
        if somebody_waits and (self.num_unreturned or self._deferred):
            # What is on its way back may make room for somebody.
            return 1, False
        next_finish_clock = decodes.next_finish_clock()
        assert next_finish_clock is not None
        num_to_finish = next_finish_clock - self.planned_clock + 1
        repeats = min(num_to_finish, self._repeat_max)
        if repeats <= 1:
            return 1, False
        # Blocks on their way back come free between repetitions: growing must not evict what they would save.
        num_blocks = self.kv.num_free if self._deferred else self.kv.num_available
        num_with_room = decodes.repeat_max(self.planned_clock, num_blocks, repeats + 1)
        if num_with_room <= repeats:
            return num_with_room, False
        is_quiet = repeats == num_to_finish and not somebody_waits and self._steps_in_flight_max > 1
        return repeats, is_quiet and not decodes.num_stoppable and decodes.goes_on_after(next_finish_clock)

    def _drain_fully_planned(self) -> None:
        while (request := self.decodes.pop_fully_planned(self.planned_clock)) is not None:
            request.move(RequestState.DRAINING)
            self.draining.append(request)
            self.num_unreturned += 1

    def _make_room_for_decodes(self, done_clock: int) -> bool:
        """Preempt, newest first, until every decode can have its next slot; False: wait."""
        while len(self.decodes.growing(self.planned_clock + 1)) > self.kv.num_available:
            victim = self._newest_running()
            if victim is None:
                return False
            self.preempted_since.append(victim)
            self.requeue(victim, self.num_returned_output(victim, done_clock), done_clock)
            if self._deferred:
                return False  # the victim's blocks are free once the committed steps are back
        return True

    def _newest_running(self) -> LocalRequest | None:
        """The request to preempt: the last admitted, but never the oldest of those that run.

        A prefilled one that waits for a place here holds blocks that nobody else would give back.
        """
        running = [*self.decodes.members.values(), *self.prefilling.values()]
        oldest = min(running, key=lambda request: request.sequence)
        holders = [*running, *self.staying]
        candidates = [request for request in holders if request is not oldest and not request.num_transfers]
        return max(candidates, key=lambda request: request.sequence, default=None)

    def _continue_prefills(self, chunks: list[TokenChunk], budget: int) -> int:
        for request in self.prefilling.values():
            if budget <= 0:
                break
            budget -= self._add_chunk(chunks, request, budget)
        return budget

    def _admit_waiting(self, chunks: list[TokenChunk], budget: int) -> None:
        # Every request that prefills has its chunk here already, unless the budget is spent.
        num_free_seqs = min(self._max_num_seqs - self.num_running, self._num_chunks_max - len(chunks))
        while self.waiting and budget > 0 and num_free_seqs > 0:
            request = self.waiting[0]
            match = self.kv.match(request.spec)
            if not self._has_room(match, request.prefill_target):
                break
            self.waiting.popleft()
            num_free_seqs -= 1
            self._admitted(request)
            blocks = self.kv.admit(request.spec, match, request.prefill_target)
            request.blocks = blocks
            request.num_computed_tokens = blocks.num_shared * self.kv.block_size
            request.num_returned_tokens = request.num_computed_tokens
            request.move(RequestState.PREFILLING)
            self.prefilling[request.request_id] = request
            self._new_block_ids.append((request.request_id, tuple(blocks.block_ids)))
            budget -= self._add_chunk(chunks, request, budget)

    def _add_chunk(self, chunks: list[TokenChunk], request: LocalRequest, budget: int) -> int:
        num_computed = request.num_computed_tokens
        num_tokens = min(request.prefill_target - num_computed, min(budget, self._chunk_tokens_max))
        request.num_computed_tokens = num_computed + num_tokens
        samples = request.num_computed_tokens == request.prefill_target
        chunks.append(TokenChunk(request.request_id, num_tokens, num_computed, samples))
        return num_tokens

    def _settle_chunks(self, chunks: list[TokenChunk]) -> None:
        """Requests whose last known token is in the step just committed go on to what comes next."""
        for chunk in chunks:
            if not chunk.samples:
                continue
            request = self.prefilling.pop(chunk.request_id)
            base_output = request.num_output_tokens + 1
            if base_output >= request.spec.max_output_tokens:
                request.base_output = base_output
                request.join_clock = request.finish_clock = self.planned_clock
                request.move(RequestState.DRAINING)
                self.draining.append(request)
                self.num_unreturned += 1
            elif request.hand_over:
                request.move(RequestState.PREFILLED)
                self.num_unreturned += 1
            else:
                self.join_decodes(request, base_computed=request.prefill_target, base_output=base_output)

    def check(self) -> None:
        """Assert what must always hold of the queues and blocks (invariants I1, I2, I6)."""
        self.kv.check()
        assert self.num_running <= self._max_num_seqs, "I6: more running than max_num_seqs"
        for request in self.waiting:
            assert request.blocks is None, f"I1: {request.request_id} waits and holds blocks"
