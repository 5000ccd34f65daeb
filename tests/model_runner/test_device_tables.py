"""The device's tables become what the host's are, whatever was written in between and in whichever order."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.model_runner.device_tables import DeviceTables
from backends.model_runner.packed_arrays import ArrayPacker, StagingBuffer
from backends.model_runner.request_table import RequestTable
from backends.model_runner.step_arrays import step_arrays
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec

CPU = torch.device("cpu")
BLOCK_SIZE = 4
VOCAB_SIZE = 1000


class Life:
    """Requests that come, run, are preempted and go; some steps fail before they reach the device."""

    def __init__(self) -> None:
        self.table = RequestTable(BLOCK_SIZE, VOCAB_SIZE, num_positions=4096)
        self.device = DeviceTables(self.table, CPU)
        self.tokens: dict[RequestId, list[int]] = {}
        self._num_named = 0
        self._next_block = 0

    def add(self, num_tokens: int) -> None:
        request_id = RequestId(f"r{self._num_named}")
        self._num_named += 1
        self.tokens[request_id] = [(self._num_named * 31 + at * 7) % VOCAB_SIZE for at in range(num_tokens)]
        spec = RequestSpec(request_id, 0, num_tokens, 50, prompt_token_ids=tuple(self.tokens[request_id]))
        self.table.add(spec, ())

    def remove(self, index: int) -> None:
        request_id = list(self.tokens)[index % len(self.tokens)]
        del self.tokens[request_id]
        self.table.remove(request_id)

    def prefill(self, *, fails: bool) -> None:
        """Everybody, from the start, in new blocks."""
        ids = tuple(self.tokens)
        blocks = tuple((request_id, self._blocks(len(self.tokens[request_id]))) for request_id in ids)
        chunks = tuple(TokenChunk(request_id, len(self.tokens[request_id]), 0, False) for request_id in ids)
        sequences = self.table.apply(StepPlan((), 0, chunks, blocks, ids))
        packer = ArrayPacker(StagingBuffer(is_pinned=False))
        packed = self.device.pack(step_arrays(self.table, sequences), packer)
        if packed.token_writes is not None:
            self._check_cells(packed.token_writes[0].on(packer.copy_to(CPU)))
        if packed.block_writes is not None:
            self._check_cells(packed.block_writes[0].on(packer.copy_to(CPU)))
        if fails:
            return
        inputs = self.device.inputs(packed, packer.copy_to(CPU))
        assert not self.table.token_writes
        assert not self.table.block_writes
        assert inputs.token_ids.tolist() == [token for request_id in ids for token in self.tokens[request_id]]
        for row, (_, block_ids) in enumerate(blocks):
            assert tuple(inputs.block_tables[row, : len(block_ids)].tolist()) == block_ids

    def _check_cells(self, cells: torch.Tensor) -> None:
        """A device writes in any order, so no cell may be written twice."""
        assert cells.unique().numel() == cells.numel()

    def _blocks(self, num_tokens: int) -> tuple[BlockId, ...]:
        first, self._next_block = self._next_block, self._next_block + -(-num_tokens // BLOCK_SIZE)
        return tuple(map(BlockId, range(first, self._next_block)))


turns = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 90)),
    st.tuples(st.just("remove"), st.integers(0, 99)),
    st.tuples(st.just("run"), st.just(0)),
    st.tuples(st.just("fail"), st.just(0)),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(turns, max_size=40))
def test_tables_agree(history: list[tuple[str, int]]) -> None:
    life = Life()
    for turn, number in [*history, ("add", 3), ("fail", 0), ("run", 0)]:
        if turn == "add":
            life.add(number)
        elif not life.tokens:
            continue
        elif turn == "remove":
            life.remove(number)
        else:
            life.prefill(fails=turn == "fail")
