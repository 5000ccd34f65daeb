"""What a graph's operators take, from their FLOPs and bytes and a device's rates.

Matrix products are priced by their shapes, experts as a roofline, collectives by what crosses links, and
all others by the bytes that they stream. Attention over the cache is priced apart: its work is in context
tokens and query-key pairs, not in shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from sagellm.cost_model.gemm_time import GemmTime, MeasuredGemm, RooflineGemm, clamped, linear
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.models.model_config import config_of_shape
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.expert_operators import Experts
from sagellm.runtime.execution_graph.ir import AnyOperator, ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import AllGather, AllReduce, Attention, KVSend, Linear, OperatorWork
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.tensors import DTYPE_BYTES, StepSizes, Tensor

Gemm = Callable[[int, int, int], float]


@dataclass(frozen=True, slots=True)
class EqualNodes:
    """Nodes of one graph that do the same work."""

    operator: AnyOperator
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    count: int

    def work(self, sizes: StepSizes) -> OperatorWork:
        """Of one of them."""
        return self.operator.work(self.inputs, self.outputs, sizes)


@lru_cache(maxsize=16)
def engine_graph(model: ModelShape, tp: int) -> ExecutionGraph:
    """What one of ``tp`` ranks runs, with the fusions that serving engines have in common.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads.
    """
    return fuse(build_graph(config_of_shape(model), tp))


def equal_nodes(graph: ExecutionGraph) -> tuple[EqualNodes, ...]:
    """A graph's nodes, those of equal operators and shapes counted together."""
    first: dict[object, Node] = {}
    counts: dict[object, int] = {}
    for node in graph.nodes:
        tensors = graph.tensors_of((*node.inputs, *node.outputs))
        key = (node.operator, tuple((tensor.shape, tensor.dtype, tensor.kind) for tensor in tensors))
        first.setdefault(key, node)
        counts[key] = counts.get(key, 0) + 1
    return tuple(replace(_alone(graph, node), count=counts[key]) for key, node in first.items())


def _alone(graph: ExecutionGraph, node: Node) -> EqualNodes:
    return EqualNodes(node.operator, graph.tensors_of(node.inputs), graph.tensors_of(node.outputs), 1)


@dataclass(frozen=True, slots=True)
class GraphPrices:
    """Nanoseconds of all operators of a graph, by a step's sizes. What has no rows takes no time."""

    profile: AnalyticProfile
    nodes: tuple[EqualNodes, ...]
    tp: int
    gemm: Gemm

    def work_ns(self, sizes: StepSizes) -> float:
        """All but attention over the cache, and what is sent of it."""
        return self._sum_ns(sizes, lambda operator: not isinstance(operator, Attention | KVSend))

    def gemm_ns(self, sizes: StepSizes) -> float:
        """Matrix products, those of experts included."""
        return self._sum_ns(sizes, lambda operator: isinstance(operator, Linear | Experts))

    def operator_ns(self, nodes: EqualNodes, sizes: StepSizes) -> float:
        """One of the nodes."""
        match nodes.operator:
            case Linear():
                return self._linear_ns(nodes, sizes)
            case Experts():
                return self._experts_ns(nodes.work(sizes))
            case Attention() as operator:
                return self._attention_ns(operator, nodes.work(sizes), sizes.num_seqs)
            case AllReduce():
                return all_reduce_ns(self.profile, nodes.work(sizes).communicated_bytes, self.tp)
            case AllGather():
                return all_gather_ns(self.profile, nodes.work(sizes).communicated_bytes, self.tp)
            case KVSend():
                return nodes.work(sizes).communicated_bytes / _network_gbps(self.profile)
            case _:
                gbps = self.profile.device.memory_gbps * self.profile.rates.stream_memory_efficiency
                return nodes.work(sizes).memory_bytes / gbps

    def attention_work(self, sizes: StepSizes) -> OperatorWork:
        """FLOPs and KV bytes of attention in all layers."""
        works = [(nodes.count, nodes.work(sizes)) for nodes in self.nodes if isinstance(nodes.operator, Attention)]
        return OperatorWork(
            flops=sum(count * work.flops for count, work in works),
            kv_read_bytes=sum(count * work.kv_read_bytes for count, work in works),
        )

    def _sum_ns(self, sizes: StepSizes, counts: Callable[[AnyOperator], bool]) -> float:
        return sum(nodes.count * self.operator_ns(nodes, sizes) for nodes in self.nodes if counts(nodes.operator))

    def _linear_ns(self, nodes: EqualNodes, sizes: StepSizes) -> float:
        rows, width = nodes.outputs[0].sizes_in(sizes)
        return self.gemm(rows, width, nodes.inputs[0].width) if rows else 0.0

    def _experts_ns(self, work: OperatorWork) -> float:
        """Their products are many and small, so no measured shape stands for them."""
        device, rates = self.profile.device, self.profile.rates
        flops_ns = work.flops / (device.bf16_tflops * rates.gemm_compute_efficiency * 1e3)
        return max(flops_ns, work.memory_bytes / (device.memory_gbps * rates.gemm_memory_efficiency))

    def _attention_ns(self, operator: Attention, work: OperatorWork, num_seqs: int) -> float:
        """The longer of reading keys and values, as for a decode, and of the arithmetic."""
        device, rates = self.profile.device, self.profile.rates
        efficiency = attention_read_efficiency(self.profile, num_seqs * operator.num_kv_heads)
        flops_ns = work.flops / (device.bf16_tflops * rates.attention_compute_efficiency * 1e3)
        return max(flops_ns, work.kv_read_bytes / (device.memory_gbps * efficiency))


def node_prices(profile: AnalyticProfile, graph: ExecutionGraph, sizes: StepSizes) -> dict[str, float]:
    """Nanoseconds of each node of ``graph`` in a step of ``sizes``: what a schedule is made from."""
    prices = make_graph_prices(profile, graph)
    return {node.name: prices.operator_ns(_alone(graph, node), sizes) for node in graph.nodes}


def attention_read_efficiency(profile: AnalyticProfile, num_tiles: int) -> float:
    """Share of memory bandwidth at which decode attention reads, with so many pairs of sequence and KV head."""
    return clamped(profile.rates.attention_read_tiles, profile.rates.attention_read_efficiency, num_tiles)


def make_graph_prices(profile: AnalyticProfile, graph: ExecutionGraph) -> GraphPrices:
    dtype_bytes = DTYPE_BYTES[next(tensor.dtype for tensor in graph.tensors if tensor.kind == "weight")]
    return GraphPrices(profile, equal_nodes(graph), graph.tp, _cached(make_gemm_time(profile, dtype_bytes)))


def all_reduce_ns(profile: AnalyticProfile, num_bytes: int, tp: int) -> float:
    """An all-reduce over ``tp`` ranks: a fixed cost, and 2 (tp - 1) / tp of the bytes over each link."""
    return 0.0 if tp == 1 or not num_bytes else _collective_ns(profile, num_bytes, 2 * (tp - 1) / tp)


def all_gather_ns(profile: AnalyticProfile, num_bytes: int, tp: int) -> float:
    """An all-gather of ``num_bytes`` from each of ``tp`` ranks: each link carries those of all ranks but one."""
    return 0.0 if tp == 1 or not num_bytes else _collective_ns(profile, num_bytes, tp - 1)


def _collective_ns(profile: AnalyticProfile, num_bytes: int, crossing: float) -> float:
    """A fixed cost, and ``crossing`` times the bytes over each link.

    The all-reduce that was measured between two ranks is used where the profile has one, since its bytes
    cross a link once; its part that grows with the size is scaled.
    """
    table = profile.all_reduce_table
    if table is not None:
        fixed_us = table.us[0]
        return 1000 * (fixed_us + crossing * (linear(table.num_bytes, table.us, num_bytes) - fixed_us))
    link_gbps = profile.device.scale_up_gbps * profile.rates.all_reduce_efficiency
    return profile.rates.all_reduce_fixed_ns + crossing * num_bytes / link_gbps


def _network_gbps(profile: AnalyticProfile) -> float:
    """Out of the host, or to neighbours where nothing is stated of the network."""
    return profile.device.network_gbps or profile.device.scale_up_gbps


def make_gemm_time(profile: AnalyticProfile, dtype_bytes: int) -> GemmTime:
    """Measured shapes where the profile has them, else the roofline."""
    if profile.gemm_table is not None:
        return MeasuredGemm(profile.gemm_table, profile.device, dtype_bytes)
    return RooflineGemm(profile.device, profile.rates, dtype_bytes)


def _cached(gemm_time: GemmTime) -> Gemm:
    known: dict[tuple[int, int, int], float] = {}

    def gemm(m: int, n: int, k: int) -> float:
        value = known.get((m, n, k))
        if value is None:
            value = known[m, n, k] = gemm_time.gemm_ns(m, n, k)
        return value

    return gemm
