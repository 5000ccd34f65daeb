"""A CPU with graphs: what is captured are torch's operators, and a replay runs them on the memory of the capture.

As on a device, what a capture worked out on the host stays what it was, whatever the replay's inputs are.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from backends import registry
from backends.base import DrawTokens
from backends.cpu.backend import CpuBackend
from backends.device_info import BackendCapabilities
from backends.model_runner.sampler.cutoff import min_p_floor, top_floor
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.operators.registry import KernelRegistry
from backends.step_inputs import StepInputs
from backends.streams import DeviceGraph


def install(backend: "RecordingBackend", monkeypatch: pytest.MonkeyPatch) -> "RecordingBackend":
    """Let ``get_backend`` give the backend as it gives those of other distributions."""
    added = importlib.metadata.EntryPoint(backend.name, f"{__name__}:create_installed", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(f"{__name__}.create_installed", lambda: backend, raising=False)
    monkeypatch.setattr(registry, "_entry_points", lambda: {backend.name: added})
    return backend


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class RecordedGraph(DeviceGraph):
    """Tells its backend of replays."""

    def __init__(self, backend: "RecordingBackend") -> None:
        self._backend = backend
        self._recorder = _Recorder()

    @contextmanager
    def capture(self) -> Iterator[None]:
        self._backend.before_capture()
        with self._recorder:
            yield

    def replay(self) -> None:
        self._backend.num_replays += 1
        for func, args, kwargs, result in self._recorder.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self._recorder = _Recorder()

    def memory_from_outside(self) -> list[StorageWeakRef]:
        """What a replay reads or writes and the capture did not make: somebody must keep it."""
        own: set[int] = set()
        outside: dict[int, StorageWeakRef] = {}
        for _, args, kwargs, result in self._recorder.calls:
            for tensor in _tensors([*args, *kwargs.values()]):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    outside[storage.data_ptr()] = StorageWeakRef(storage)
            own |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(result)} - set(outside)
        return list(outside.values())


def _tensors(result: Any) -> list[torch.Tensor]:
    several = result if isinstance(result, tuple | list) else [result]
    return [each for each in several if isinstance(each, torch.Tensor)]


class RecordingBackend(CpuBackend):
    """Counts captures and replays. ``has_kernel``: it has a kernel that draws tokens."""

    name = "recording"

    def __init__(self, fails_at: int = -1, *, has_kernel: bool = False) -> None:
        self._has_kernel = has_kernel
        self.num_draws = 0
        self.graphs: list[RecordedGraph] = []
        self.num_captures = 0
        self.num_replays = 0
        self._fails_at = fails_at

    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        return replace(super().capabilities(device_index), graph_capture=True)

    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        graph = RecordedGraph(self)
        self.graphs.append(graph)
        return graph

    def before_capture(self) -> None:
        if self.num_captures == self._fails_at:
            raise torch.OutOfMemoryError("no room for a graph\nmore words")
        self.num_captures += 1

    def token_drawing(self) -> DrawTokens | None:
        return self._draw_tokens if self._has_kernel else None

    def _draw_tokens(self, *rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_draws += 1
        return draw_tokens(*rows)  # type: ignore[arg-type]

    def register_operators(self, kernels: KernelRegistry) -> None:
        kernels.register(self.name, "attention", masked_attention)


def draw_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DrawTokens` promises, asking the host for nothing, by the sampler's own functions."""
    num_rows, vocab_size = logits.shape
    is_greedy = temperature == 0
    scores = logits / torch.where(is_greedy, 1.0, temperature).unsqueeze(1)
    if min_p is not None:
        scores = scores.masked_fill(scores < min_p_floor(scores, min_p.log()), -torch.inf)
    if top_k is not None or top_p is not None:
        all_of_it = torch.full((num_rows,), vocab_size)
        top_k = all_of_it if top_k is None else torch.where(top_k == 0, vocab_size, top_k)
        top_p = torch.full((num_rows,), 2.0) if top_p is None else top_p
        scores = scores.masked_fill(
            scores < top_floor(scores.sort(1, descending=True).values, top_k, top_p), -torch.inf
        )
    keys = mixed(mixed(seeds + _GOLDEN_GAMMA) + (positions + 1) * _GOLDEN_GAMMA).view(torch.int32).view(-1, 2).T
    noise = exponential_noise(token_hashes(vocab_size, logits.device), keys)
    drawn = (scores - noise.log()).argmax(1)
    return torch.where(is_greedy, logits.argmax(1), drawn), logits.isfinite().all(1).logical_not()


_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def mixed(state: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64, of int64."""
    for num_bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        state = (state ^ ((state >> num_bits) & ((1 << (64 - num_bits)) - 1))) * factor
    return state


def sequences_of_rows(inputs: StepInputs, num_rows: int) -> torch.Tensor:
    """[num_rows]: whose each row is; of rows that are nobody's, anybody."""
    rows = torch.arange(num_rows)
    if inputs.decode_count is None:
        return torch.searchsorted(inputs.query_starts[1:], rows, right=True)
    num_seqs = inputs.context_lens.shape[0]
    prompts = torch.searchsorted(inputs.query_starts[inputs.num_decodes + 1 :], rows, right=True)
    return torch.where(rows < inputs.decode_count, rows, (inputs.num_decodes + prompts).clamp(max=num_seqs - 1))


def masked_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Attention that asks the host for nothing: each row looks at every place of its block table."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    sequences = sequences_of_rows(inputs, query.shape[0])
    positions = torch.arange(inputs.block_tables.shape[1] * block_size)
    blocks = inputs.block_tables[sequences][:, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    seen = positions <= inputs.positions.unsqueeze(1)
    if sliding_window:
        seen &= positions > inputs.positions.unsqueeze(1) - sliding_window
    queries = query.view(query.shape[0], num_kv_heads, -1, head_dim)
    scores = torch.einsum("tkgd,tpkd->tkgp", queries, key_cache.flatten(0, 1)[slots]) * scale
    weights = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum("tkgp,tpkd->tkgd", weights, value_cache.flatten(0, 1)[slots]).reshape(query.shape)
