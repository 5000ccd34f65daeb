"""A CPU with graphs: what is captured are torch's operators, and a replay runs them on the memory of the capture.

As on a device, what a capture worked out on the host stays what it was, whatever the replay's inputs are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.cpu.backend import CpuBackend
from backends.device_info import BackendCapabilities
from backends.operators.registry import KernelRegistry
from backends.step_inputs import StepInputs
from backends.streams import DeviceGraph


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


def _tensors(result: Any) -> list[torch.Tensor]:
    several = result if isinstance(result, tuple | list) else [result]
    return [each for each in several if isinstance(each, torch.Tensor)]


class RecordingBackend(CpuBackend):
    """Counts captures and replays."""

    name = "recording"

    def __init__(self, fails_at: int = -1) -> None:
        self.num_captures = 0
        self.num_replays = 0
        self._fails_at = fails_at

    def capabilities(self, device_index: int | None = None) -> BackendCapabilities:
        return replace(super().capabilities(device_index), graph_capture=True)

    def create_graph(self, memory_of: DeviceGraph | None = None) -> DeviceGraph:
        return RecordedGraph(self)

    def before_capture(self) -> None:
        if self.num_captures == self._fails_at:
            raise torch.OutOfMemoryError("no room for a graph\nmore words")
        self.num_captures += 1

    def register_operators(self, registry: KernelRegistry) -> None:
        registry.register(self.name, "attention", masked_attention)


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
    sequences = torch.searchsorted(inputs.query_starts[1:], torch.arange(query.shape[0]), right=True)
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
