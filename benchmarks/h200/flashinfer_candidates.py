"""FlashInfer's paged attention, planned on the host before the timed region; the time of planning is reported apart.

FlashInfer is no dependency of the project: where it cannot be imported, or has no compiled module for a case, its
rows say so. Its prefill kernels serve any batch (a decode is a prompt of one row), ``fa3`` being those for Hopper;
its decode kernels serve decodes, on tensor cores through the ``fa2`` prefill kernels; ``BatchAttention`` is one
persistent kernel for decodes and prompts together.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from benchmarks.h200.attention_candidates import Candidate, NotOfferedError, Prepared, Run
from benchmarks.h200.attention_cases import BLOCK_SIZE, AttentionBatch, Buffers

WORKSPACE_BYTES = 256 << 20
PLANS = 5


def flashinfer_candidates() -> list[Candidate]:
    """The likely winners first."""
    return [
        Candidate("flashinfer fa3", lambda batch: prepare_prefill(batch, "fa3")),
        Candidate("flashinfer decode, tensor cores", lambda batch: prepare_decode(batch, True)),
        Candidate("flashinfer decode + fa3", prepare_both),
        Candidate("flashinfer fa2", lambda batch: prepare_prefill(batch, "fa2")),
        Candidate("flashinfer batch attention", prepare_batch_attention),
        Candidate("flashinfer decode", lambda batch: prepare_decode(batch, False)),
        Candidate("flashinfer cudnn", lambda batch: prepare_prefill(batch, "cudnn")),
    ]


@cache
def import_flashinfer() -> ModuleType:
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise NotOfferedError(f"flashinfer is not to be had here: {error}") from error


@dataclass(frozen=True, slots=True)
class PageTables:
    """The block tables of some of a batch's sequences as FlashInfer takes them; all but ``pages`` on the host."""

    row_starts: torch.Tensor  # [num_seqs + 1] int32
    page_starts: torch.Tensor  # [num_seqs + 1] int32
    pages: torch.Tensor  # [page_starts[-1]] int32, on the device
    last_page_lens: torch.Tensor  # [num_seqs] int32
    context_lens: torch.Tensor  # [num_seqs] int32


def page_tables(batch: AttentionBatch, first: int, end: int) -> PageTables:
    sequences = batch.case.sequences[first:end]
    context_lens = torch.tensor([context_len for _, context_len in sequences], dtype=torch.int32)
    counts = (context_lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    tables = batch.inputs.block_tables[first:end]
    return PageTables(
        starts_of(torch.tensor([rows for rows, _ in sequences], dtype=torch.int32)),
        starts_of(counts),
        torch.cat([table[:count] for table, count in zip(tables, counts.tolist(), strict=True)]),
        context_lens - (counts - 1) * BLOCK_SIZE,
        context_lens,
    )


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def prepare_prefill(batch: AttentionBatch, backend: str) -> Prepared:
    flashinfer = import_flashinfer()
    if backend == "cudnn" and importlib.util.find_spec("cudnn") is None:
        raise NotOfferedError("nvidia-cudnn-frontend is not installed")
    run, plan = prefill_calls(flashinfer, batch, backend, 0)
    return Prepared(run, host_us(plan))


def prefill_calls(
    flashinfer: ModuleType, batch: AttentionBatch, backend: str, first: int
) -> tuple[Run, Callable[[], None]]:
    """Attention of the sequences from ``first`` on by the prefill kernels."""
    tables = page_tables(batch, first, len(batch.case.sequences))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(batch), "NHD", backend=backend)
    options: dict[str, Any] = {}
    if backend == "cudnn":
        options = {
            "max_token_per_sequence": int(tables.row_starts.diff().max()),
            "max_sequence_kv": int(tables.context_lens.max()),
            "seq_lens": tables.context_lens,
        }

    def plan() -> None:
        wrapper.plan(
            tables.row_starts,
            tables.page_starts,
            tables.pages,
            tables.last_page_lens,
            *head_counts(batch),
            BLOCK_SIZE,
            causal=True,
            sm_scale=batch.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            **options,
        )

    def run(buffers: Buffers) -> torch.Tensor:
        return wrapper.run(buffers.query[first:], (buffers.key_cache, buffers.value_cache))

    return run, plan


def prepare_decode(batch: AttentionBatch, uses_tensor_cores: bool) -> Prepared:
    flashinfer = import_flashinfer()
    if not batch.case.has_only_decodes:
        raise NotOfferedError("for decodes only")
    run, plan = decode_calls(flashinfer, batch, uses_tensor_cores)
    return Prepared(run, host_us(plan))


def decode_calls(
    flashinfer: ModuleType, batch: AttentionBatch, uses_tensor_cores: bool
) -> tuple[Run, Callable[[], None]]:
    """Attention of the sequences of one row."""
    num_decodes = batch.inputs.num_decodes
    tables = page_tables(batch, 0, num_decodes)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(batch), "NHD", use_tensor_cores=uses_tensor_cores, backend="fa2"
    )

    def plan() -> None:
        wrapper.plan(
            tables.page_starts,
            tables.pages,
            tables.last_page_lens,
            *head_counts(batch),
            BLOCK_SIZE,
            sm_scale=batch.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )

    def run(buffers: Buffers) -> torch.Tensor:
        return wrapper.run(buffers.query[:num_decodes], (buffers.key_cache, buffers.value_cache))

    return run, plan


def prepare_both(batch: AttentionBatch) -> Prepared:
    """The decodes by the one kernel, then the prompts by the other."""
    flashinfer = import_flashinfer()
    if not 0 < batch.inputs.num_decodes < len(batch.case.sequences):
        raise NotOfferedError("for mixed batches")
    run_decodes, plan_decodes = decode_calls(flashinfer, batch, True)
    run_prompts, plan_prompts = prefill_calls(flashinfer, batch, "fa3", batch.inputs.num_decodes)

    def plan() -> None:
        plan_decodes()
        plan_prompts()

    return Prepared(lambda buffers: [run_decodes(buffers), run_prompts(buffers)], host_us(plan))


def prepare_batch_attention(batch: AttentionBatch) -> Prepared:
    flashinfer = import_flashinfer()
    tables = page_tables(batch, 0, len(batch.case.sequences))
    wrapper = flashinfer.BatchAttention(kv_layout="NHD", device=str(batch.buffers[0].query.device))

    def plan() -> None:
        num_heads, num_kv_heads, head_dim = head_counts(batch)
        wrapper.plan(
            tables.row_starts,
            tables.page_starts,
            tables.pages,
            tables.context_lens,
            num_heads,
            num_kv_heads,
            head_dim,
            head_dim,
            BLOCK_SIZE,
            causal=True,
            sm_scale=batch.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )

    def run(buffers: Buffers) -> torch.Tensor:
        return wrapper.run(buffers.query, (buffers.key_cache, buffers.value_cache))[0]

    return Prepared(run, host_us(plan))


def head_counts(batch: AttentionBatch) -> tuple[int, int, int]:
    heads = batch.case.heads
    return heads.num_heads, heads.num_kv_heads, heads.head_dim


def workspace(batch: AttentionBatch) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.buffers[0].query.device)


def host_us(plan: Callable[[], None]) -> float:
    """Median microseconds of the host for a plan, after one that loads modules; leaves the plan in place."""
    plan()
    times_s = []
    for _ in range(PLANS):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        plan()
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) * 1e6
