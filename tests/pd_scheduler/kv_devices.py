"""Devices of which the KV cache is real: what a batch gives depends on what its block tables hold.

The "KV" of a token is the token itself. A batch writes its tokens into their slots, reads every slot of
its context through the block table, and makes the next token from what it read. So a wrong block, a
wrong chunk, a copy that was left out or a block reused too early gives a wrong token.
"""

from collections.abc import Sequence
from zlib import crc32

from sagellm.models.model_shape import ModelShape
from sagellm.runtime.scheduler import PDScheduler
from sagellm.runtime.scheduler.base import Batch, BatchEntry, KVMigrationTask, Request

GARBAGE = -1
VOCAB_SIZE = 50

TINY_MODEL = ModelShape(
    name="tiny",
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
    vocab_size=VOCAB_SIZE,
)
"""32 bytes of KV a token: 2 (K and V) x 2 layers x 1 head x 4 x 2 bytes."""


def next_token(context: Sequence[int]) -> int:
    """The model: any function of the whole context will do."""
    return crc32(repr(list(context)).encode()) % VOCAB_SIZE


def expected_output(request: Request) -> list[int]:
    """What one device with endless memory makes of the request."""
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    while len(output) < request.max_new_tokens and not (output and output[-1] in request.stop_token_ids):
        output.append(next_token(tokens + output))
    return output


class KVDevices:
    """The KV caches of all devices of one scheduler."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int, int], int] = {}  # (device, block, offset)

    def run(self, batch: Batch) -> list[int]:
        """The tokens that the batch gives, one for each request that is sampled."""
        for entry in batch.entries:
            self._write(batch.device_id, entry, entry.token_ids)
        return [next_token(self._context(batch.device_id, entry)) for entry in batch.entries if entry.samples]

    def spoil(self, batch: Batch) -> None:
        """The batch fails half-way: what it wrote cannot be trusted."""
        for entry in batch.entries:
            self._write(batch.device_id, entry, [GARBAGE] * entry.num_tokens)

    def copy(self, task: KVMigrationTask, *, spoiled: bool = False) -> None:
        for source, target in zip(task.source_block_ids, task.target_block_ids, strict=True):
            for offset in range(self._block_size):
                token = self._slots.get((task.source_device_id, source, offset), GARBAGE)
                self._slots[task.target_device_id, target, offset] = GARBAGE if spoiled else token

    def _slot(self, device_id: int, entry: BatchEntry, position: int) -> tuple[int, int, int]:
        index, offset = divmod(position, self._block_size)
        return device_id, entry.block_table[index], offset

    def _write(self, device_id: int, entry: BatchEntry, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens, start=entry.num_computed_tokens):
            self._slots[self._slot(device_id, entry, position)] = token

    def _context(self, device_id: int, entry: BatchEntry) -> list[int]:
        num_tokens = entry.num_computed_tokens + entry.num_tokens
        return [self._slots[self._slot(device_id, entry, position)] for position in range(num_tokens)]


def run_to_end(scheduler: PDScheduler, devices: KVDevices, rounds_max: int = 5_000) -> list[Batch]:
    """Draw and complete whatever there is until no request is left; the batches in order."""
    batches: list[Batch] = []
    for _ in range(rounds_max):
        if not scheduler.has_unfinished_requests:
            scheduler.check()
            return batches
        if (batch := scheduler.get_prefill_batch()) is not None:
            batches.append(batch)
            scheduler.complete_prefill(batch, devices.run(batch))
        for task in scheduler.get_migrations():
            devices.copy(task)
            scheduler.complete_migration(task)
        if (batch := scheduler.get_decode_batch()) is not None:
            batches.append(batch)
            scheduler.complete_decode(batch, devices.run(batch))
    raise AssertionError(f"requests are left after {rounds_max} rounds")
