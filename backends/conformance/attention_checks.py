"""Paged attention: decodes, prompts, chunks of prompts and batches of all of them, in each type that is claimed."""

from dataclasses import dataclass
from functools import partial

import torch

from backends.conformance import oracle
from backends.conformance.batches import HeadShape, PagedBatch, inputs_on, paged_batch
from backends.conformance.check import Check, Subject, claimed, expect
from backends.conformance.closeness import expect_close
from backends.conformance.operator_checks import moved
from backends.step_inputs import StepInputs

_QWEN = HeadShape(28, 4, 128)
_SMALL = HeadShape(14, 2, 64)
_DECODES = tuple((1, context_len) for context_len in (1, 15, 16, 17, 64, 333))
_PROMPTS = ((5, 5), (64, 64), (2, 2), (130, 130))
_CHUNKS = ((7, 45), (33, 160), (2, 3), (16, 500))
_MIXED = (*_DECODES, *_CHUNKS, *_PROMPTS)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    title: str
    sequences: tuple[tuple[int, int], ...]
    heads: HeadShape = _SMALL
    block_size: int = 16
    sliding_window: int = 0


_CASES = (
    AttentionCase("decodes", _DECODES, _QWEN),
    AttentionCase("one decode", ((1, 77),), _QWEN),
    AttentionCase("one decode of a long context", ((1, 4100),), _QWEN),
    AttentionCase("many decodes", tuple((1, 3 + 7 * index) for index in range(48))),
    AttentionCase("prompts", _PROMPTS, _QWEN),
    AttentionCase("one long prompt", ((700, 700),)),
    AttentionCase("one prompt of 2,500 tokens", ((2500, 2500),), HeadShape(2, 1, 64)),
    AttentionCase("many prompts and chunks", tuple((20 + index, 20 + 3 * index) for index in range(48))),
    AttentionCase("long prompts and chunks behind decodes", (*_DECODES, (600, 1100), (3, 50), (520, 520)), _QWEN),
    AttentionCase("long chunks, window 100", ((1, 90), (600, 1100), (3, 50), (520, 520)), sliding_window=100),
    AttentionCase("a long prompt, heads of 80", ((1, 9), (600, 611)), HeadShape(6, 2, 80)),
    AttentionCase("chunks of prompts", _CHUNKS, _QWEN),
    AttentionCase("a mixed batch", _MIXED, _QWEN),
    AttentionCase("a mixed batch, window 32", _MIXED, sliding_window=32),
    AttentionCase("a mixed batch, window 1", _MIXED, sliding_window=1),
    AttentionCase("a mixed batch, window beyond every context", _MIXED, sliding_window=10_000),
    AttentionCase("one decode of a long context, window 1000", ((1, 4100),), sliding_window=1000),
    AttentionCase("a mixed batch, heads of 80", _MIXED, HeadShape(6, 2, 80)),
    AttentionCase("a mixed batch, heads of 8", _MIXED, HeadShape(4, 2, 8)),
    AttentionCase("one decode of a long context, heads of 8", ((1, 4100),), HeadShape(4, 2, 8)),
    AttentionCase("a mixed batch, heads of 12", _MIXED, HeadShape(6, 1, 12)),
    AttentionCase("a mixed batch, heads of 96", _MIXED, HeadShape(6, 2, 96)),
    AttentionCase("a mixed batch, heads of 32", _MIXED, HeadShape(4, 1, 32)),
    AttentionCase("a mixed batch, heads of 256", _MIXED, HeadShape(4, 2, 256)),
    AttentionCase("a mixed batch, no sharing of heads", _MIXED, HeadShape(3, 3, 64)),
    AttentionCase("a mixed batch, one key-value head", _MIXED, HeadShape(8, 1, 64)),
    AttentionCase("a mixed batch, blocks of 8", _MIXED, block_size=8),
    AttentionCase("a mixed batch, blocks of 48", _MIXED, block_size=48),
    AttentionCase("a mixed batch, blocks of 128", _MIXED, block_size=128),
)


def attention_checks(dtypes: tuple[str, ...]) -> tuple[Check, ...]:
    """Names of types as torch has them."""
    checks = []
    for name in dtypes:
        dtype = getattr(torch, name)
        checks += [
            Check("attention", f"{name} {case.title}", partial(_attention, case=case, dtype=dtype)) for case in _CASES
        ]
        checks.append(Check("attention", f"{name} captured, then other contexts", partial(_captured, dtype=dtype)))
    return tuple(checks)


def _attention(subject: Subject, case: AttentionCase, dtype: torch.dtype) -> None:
    batch = paged_batch(case.sequences, case.heads, case.block_size, dtype)
    scale = case.heads.head_dim**-0.5
    exact = oracle.attention(
        batch.query, batch.key_cache, batch.value_cache, batch.inputs, scale=scale, sliding_window=case.sliding_window
    )
    found = _run(subject, batch, scale, case.sliding_window)
    expect_close(found, exact, dtype, "attention")


def _run(subject: Subject, batch: PagedBatch, scale: float, sliding_window: int) -> torch.Tensor:
    device = subject.backend.torch_device()
    kernel = subject.registry.kernel(subject.backend.name, "attention")
    inputs = inputs_on(batch.inputs, device)
    block_size = batch.key_cache.shape[1]
    prepared = inputs
    if kernel.prepare is not None:
        prepared = kernel.prepare(inputs, block_size=block_size, sliding_window=sliding_window)
    found: torch.Tensor = kernel.run(
        moved(batch.query, device),
        batch.key_cache.to(device),
        batch.value_cache.to(device),
        prepared,
        scale=scale,
        sliding_window=sliding_window,
    )
    return found


def _captured(subject: Subject, dtype: torch.dtype) -> None:
    """Decodes captured at one length, replayed at another, as a runner does with the longest in mind."""
    backend = subject.backend
    can = backend.capabilities()
    claimed(can.graph_capture and can.paged_attention, "graph capture of its own paged attention")
    device = backend.torch_device()
    run = subject.registry.kernel(backend.name, "attention").run
    scale = _QWEN.head_dim**-0.5
    batch = paged_batch(((1, 300), (1, 900), (1, 64)), _QWEN, 16, dtype)
    query, keys, values = moved(batch.query, device), batch.key_cache.to(device), batch.value_cache.to(device)
    inputs = inputs_on(batch.inputs, device)
    run(query, keys, values, inputs, scale=scale)
    graph = backend.create_graph()
    with graph.capture():
        found = run(query, keys, values, inputs, scale=scale)
    for context_lens in ((300, 900, 64), (1, 31, 17), (299, 513, 63)):
        changed = _with_contexts(batch.inputs, context_lens)
        exact = oracle.attention(batch.query, batch.key_cache, batch.value_cache, changed, scale=scale)
        inputs.context_lens.copy_(changed.context_lens)
        inputs.positions.copy_(changed.positions)
        graph.replay()
        backend.synchronize()
        expect_close(found, exact, dtype, f"replayed with contexts {context_lens}")
    expect(torch.equal(batch.inputs.block_tables, inputs.block_tables.cpu()), "attention changed the block tables")


def _with_contexts(inputs: StepInputs, context_lens: tuple[int, ...]) -> StepInputs:
    changed = inputs_on(inputs, torch.device("cpu"))
    changed.context_lens = torch.tensor(context_lens, dtype=torch.int32)
    changed.positions = changed.context_lens.long() - 1
    return changed
