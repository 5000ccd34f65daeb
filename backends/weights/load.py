"""Makes a rank's weights: each is allocated once on its device and filled slice by slice."""

from typing import Protocol

import torch

from backends.weights.progress import Progress
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.tensors import WeightSource, WeightSpec


class WeightSupply(Protocol):
    """Where tensors come from: a ``Checkpoint``, or ``DummyWeights``."""

    def check(self, sources: dict[str, WeightSource]) -> None:
        """Raises ``ValueError`` where the tensors are not those of the model."""

    def fill(self, target: torch.Tensor, source: WeightSource, dim: int, first: int, end: int) -> None:
        """Write the range ``first : end`` of dimension ``dim`` of the source into ``target``."""


def load_weights(
    graph: ExecutionGraph, supply: WeightSupply, *, rank: int, device: torch.device | str, progress: Progress
) -> dict[str, torch.Tensor]:
    """The weights of one rank of ``graph.tp`` by the graph's names, in the graph's types, on ``device``.

    Two weights that are made from the same parts are one tensor. Raises ``ValueError`` where ``supply``
    has not the tensors of the model, or the device has no room for them.
    """
    supply.check({source.name: source for spec in graph.weights for source in spec.sources})
    dtypes = _dtypes(graph)
    loaded: dict[tuple[object, ...], torch.Tensor] = {}
    weights = {}
    whole_bytes = weight_bytes(graph)
    progress.begin(whole_bytes)
    for spec in graph.weights:
        made_from = (spec.sources, spec.shape, dtypes[spec.name])
        if made_from not in loaded:
            try:
                place = _place(spec, dtypes[spec.name], device)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; allocators of the host raise it bare
                raise ValueError(
                    f"{graph.model}: a rank's weights take {whole_bytes / 1e9:.1f} GB, for which {device} has no room"
                ) from error
            loaded[made_from] = _fill(place, spec, supply, rank, graph.tp)
            progress.advance(_num_bytes(spec, dtypes[spec.name]))
        weights[spec.name] = loaded[made_from]
    progress.end()
    return weights


def weight_bytes(graph: ExecutionGraph) -> int:
    """Memory that ``load_weights`` takes for one rank."""
    dtypes = _dtypes(graph)
    sizes = {
        (spec.sources, spec.shape, dtypes[spec.name]): _num_bytes(spec, dtypes[spec.name]) for spec in graph.weights
    }
    return sum(sizes.values())


def _dtypes(graph: ExecutionGraph) -> dict[str, torch.dtype]:
    return {tensor.name: getattr(torch, tensor.dtype) for tensor in graph.tensors if tensor.kind == "weight"}


def _place(spec: WeightSpec, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Memory for a weight, as its sources are joined."""
    parts = [source.rank_shape for source in spec.sources]
    return torch.empty((sum(part[0] for part in parts), *parts[0][1:]), dtype=dtype, device=device)


def _fill(weight: torch.Tensor, spec: WeightSpec, supply: WeightSupply, rank: int, tp: int) -> torch.Tensor:
    row = 0
    for source in spec.sources:
        part = source.rank_shape
        dim, first, end = source.range_of(rank, tp)
        place = weight[row : row + part[0]]
        if end - first < part[dim]:
            place.narrow(dim, end - first, part[dim] - (end - first)).zero_()
        if end > first:
            supply.fill(place.narrow(dim, 0, end - first), source, dim, first, end)
        row += part[0]
    return weight.view(spec.shape)


def _num_bytes(spec: WeightSpec, dtype: torch.dtype) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count * dtype.itemsize
