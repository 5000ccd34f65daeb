"""What an executor knows of its requests: where each sequence stands, and which blocks hold it.

Everything that a plan needs is in arrays with a row for each request, so that a step of hundreds of
decodes costs a few array operations. Tokens themselves live on the device (`DeviceTables`); the table
keeps what is yet to be copied there.
"""

from dataclasses import dataclass

import numpy as np

from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.packed_arrays import Array
from backends.model_runner.sampler.parameter_table import ParameterTable
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.plan import StepPlan
from sagellm.core.request import RequestSpec

_NUM_ROWS_MIN = 16
_NUM_COLUMNS_MIN = 64


@dataclass(slots=True)
class KnownRequest:
    """A request from `add_request` to `remove_request`."""

    spec: RequestSpec
    row: int
    table_step: int = -1  # the plan that began its block table
    has_run: bool = False  # since its table began: a chunk of it was planned, or its KV has arrived


@dataclass(frozen=True, slots=True)
class TokenWrite:
    """Tokens of a request that the device does not have yet."""

    row: int
    first_position: int
    token_ids: Array  # int32


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """Entries of a block table that the device does not have yet."""

    row: int
    first_index: int
    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """The sequences of a step in the plan's order, decodes first."""

    rows: Array  # [num_seqs] int64: of the request table
    ends: Array  # [num_seqs] int64: the context's tokens once the step is over
    context_len_max: int
    num_decodes: int
    query_lens: Array | None = None  # [num_seqs] int64; None: one each
    samples: Array | None = None  # [num_seqs] bool; None: all

    @property
    def only_decodes(self) -> bool:
        return self.query_lens is None


class RequestTable:
    """Rows of all known requests. Grows with their number and length."""

    def __init__(self, block_size: int, vocab_size: int, num_positions: int) -> None:
        self.block_size = block_size
        self.num_positions = num_positions
        self._vocab_size = vocab_size
        self.num_rows = _NUM_ROWS_MIN
        self.num_token_columns = _NUM_COLUMNS_MIN
        self.num_tokens = np.zeros(self.num_rows, np.int64)  # known ones, those that are being drawn included
        self.num_blocks = np.zeros(self.num_rows, np.int64)
        self.block_tables = np.zeros((self.num_rows, self.num_block_columns), np.int32)
        self.parameters = ParameterTable(vocab_size, self.num_rows)
        self.token_writes: list[TokenWrite] = []
        self.block_writes: list[BlockWrite] = []
        self._requests: dict[RequestId, KnownRequest] = {}
        self._free_rows = list(reversed(range(self.num_rows)))
        self._num_plans = 0
        self._decode_ids: tuple[RequestId, ...] | None = None
        self._decode_rows = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_block_columns(self) -> int:
        return -(-self.num_token_columns // self.block_size)

    # --- requests -----------------------------------------------------------------------------------

    def add(self, spec: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        """A new request, or a known one whose KV has arrived together with its output so far."""
        known = self._requests.get(spec.request_id)
        num_tokens = spec.num_prompt_tokens + len(output_token_ids)
        if known is not None:
            first = int(self.num_tokens[known.row])
            if num_tokens > first:
                known.has_run = True
                new_ids = output_token_ids[first - spec.num_prompt_tokens :]
                self._add_tokens(known.row, first, np.array(new_ids, np.int64))
            return
        self._make_room(spec.num_prompt_tokens + spec.max_output_tokens + 1)
        row = self._free_rows.pop()
        self._requests[spec.request_id] = KnownRequest(spec, row)
        self.num_tokens[row] = self.num_blocks[row] = 0
        self.parameters.fill(row, spec)
        # Without ids a prompt is that many zeros: its length and KV are as real as any other's.
        prompt_ids = spec.prompt_token_ids or (0,) * spec.num_prompt_tokens
        self._add_tokens(row, 0, np.array(prompt_ids + output_token_ids, np.int64))

    def remove(self, request_id: RequestId) -> None:
        """Forget a request. Its row may be used again at once: what was launched before is run before.

        What is yet to be copied to the row is copied before what its next owner puts there.
        """
        known = self._requests.pop(request_id, None)
        if known is None:
            return
        self._free_rows.append(known.row)
        self._decode_ids = None

    def _add_tokens(self, row: int, first_position: int, token_ids: Array) -> None:
        if ((token_ids < 0) | (token_ids >= self._vocab_size)).any():
            # An id that the model does not have would stop a device for all requests.
            self.parameters.refuse(row)
            token_ids = np.zeros_like(token_ids)
        self.num_tokens[row] = first_position + token_ids.size
        self.token_writes.append(TokenWrite(row, first_position, token_ids.astype(np.int32)))

    def _make_room(self, num_columns: int) -> None:
        if num_columns > self.num_token_columns:
            self.num_token_columns = 1 << (num_columns - 1).bit_length()
            num_new = self.num_block_columns - self.block_tables.shape[1]
            self.block_tables = np.pad(self.block_tables, ((0, 0), (0, num_new)))
        if not self._free_rows:
            num_new = self.num_rows
            self._free_rows = list(reversed(range(self.num_rows, self.num_rows + num_new)))
            self.num_rows += num_new
            self.num_tokens = np.pad(self.num_tokens, (0, num_new))
            self.num_blocks = np.pad(self.num_blocks, (0, num_new))
            self.block_tables = np.pad(self.block_tables, ((0, num_new), (0, 0)))
            self.parameters.grow(self.num_rows)

    # --- plans --------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> SequenceRows:
        """Move every sequence on by what the plan computes; where its rows lie, before that.

        Block tables change even where this raises ExecutorError: a plan names new blocks once.
        """
        self._num_plans += 1
        for request_id in plan.preempted_request_ids:
            preempted = self._requests.get(request_id)
            if preempted is not None:
                self.num_blocks[preempted.row] = 0
        for request_id, block_ids in plan.new_block_ids:
            if request_id in self._requests:  # else it has gone since, and its table with it
                self._extend_table(self._requests[request_id], block_ids)
        decode_rows = self._rows_of_decodes(plan.decode_request_ids)
        sequences = self._with_chunks(plan, decode_rows) if plan.chunks else self._only_decodes(decode_rows)
        self._check_blocks(plan, sequences)
        rows, ends, samples = sequences.rows, sequences.ends, sequences.samples
        if samples is None:
            self.num_tokens[rows] = ends + 1
        else:
            self.num_tokens[rows[samples]] = ends[samples] + 1
        if sequences.context_len_max > self.num_positions:
            for row in rows[ends > self.num_positions].tolist():
                self.parameters.refuse(row)
        return sequences

    def _known(self, request_id: RequestId) -> KnownRequest:
        known = self._requests.get(request_id)
        if known is None:
            raise ExecutorError(f"request {request_id}: in a plan, but not known; it must be added first")
        return known

    def _extend_table(self, known: KnownRequest, block_ids: tuple[BlockId, ...]) -> None:
        row = known.row
        first_index = int(self.num_blocks[row])
        if first_index and not known.has_run and known.table_step != self._num_plans:
            first_index = 0  # room was reserved, given back and reserved again
        if not first_index:
            known.table_step = self._num_plans
        end = first_index + len(block_ids)
        if end > self.block_tables.shape[1]:
            raise ExecutorError(f"request {known.spec.request_id}: {end} blocks, more than its longest output needs")
        self.block_tables[row, first_index:end] = block_ids
        self.num_blocks[row] = end
        self.block_writes.append(BlockWrite(row, first_index, block_ids))

    def _rows_of_decodes(self, request_ids: tuple[RequestId, ...]) -> Array:
        # The machine gives the same tuple as long as the same requests decode.
        if request_ids is not self._decode_ids:
            requests = self._requests
            try:
                rows = [requests[request_id].row for request_id in request_ids]
            except KeyError as error:
                raise ExecutorError(f"request {error.args[0]}: in a plan, but not known; add it first") from error
            self._decode_rows = np.array(rows, np.int64)
            self._decode_ids = request_ids
        return self._decode_rows

    def _only_decodes(self, rows: Array) -> SequenceRows:
        ends = self.num_tokens[rows]
        return SequenceRows(rows, ends, int(ends.max()), rows.size)

    def _with_chunks(self, plan: StepPlan, decode_rows: Array) -> SequenceRows:
        num_decodes = decode_rows.size
        chunk_rows = []
        for chunk in plan.chunks:
            known = self._known(chunk.request_id)
            known.has_run = True
            chunk_rows.append(known.row)
        decode_ones = np.ones(num_decodes, np.int64)
        first = [chunk.num_computed_tokens for chunk in plan.chunks]
        lens = [chunk.num_tokens for chunk in plan.chunks]
        samples = [chunk.samples for chunk in plan.chunks]
        chunk_ends = np.array(first, np.int64) + np.array(lens, np.int64)
        ends = np.concatenate((self.num_tokens[decode_rows], chunk_ends))
        return SequenceRows(
            rows=np.concatenate((decode_rows, np.array(chunk_rows, np.int64))),
            ends=ends,
            context_len_max=int(ends.max()),
            num_decodes=num_decodes,
            query_lens=np.concatenate((decode_ones, np.array(lens, np.int64))),
            samples=np.concatenate((decode_ones.astype(np.bool_), np.array(samples, np.bool_))),
        )

    def _check_blocks(self, plan: StepPlan, sequences: SequenceRows) -> None:
        """A sequence without a block for its tokens would write over somebody else's."""
        ends = sequences.ends
        short = ends > self.num_blocks[sequences.rows] * self.block_size
        if short.any():
            index = int(short.argmax())
            request_ids = plan.decode_request_ids + tuple(chunk.request_id for chunk in plan.chunks)
            raise ExecutorError(
                f"request {request_ids[index]}: {self.num_blocks[sequences.rows[index]]} blocks of "
                f"{self.block_size} tokens, but its context is {ends[index]} tokens long"
            )
