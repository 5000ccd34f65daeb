"""What each pass of the execution graph gains as the simulator prices it. ``python benchmarks/graph_passes.py``

Prices are those of ``h200/spec``, without what is fixed for each layer: they see bytes and operations saved,
not launches. ``benchmarks/h200/measure_passes.py`` measures both on a device.
"""

from collections.abc import Callable

from backends.profile_files import load_profile
from sagellm.cost_model.graph_prices import node_prices
from sagellm.cost_model.profile import AnalyticProfile
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import KVSend
from sagellm.runtime.execution_graph.passes.fusion import fuse_add_norm, fuse_rotary_kv_write, fuse_silu_multiply
from sagellm.runtime.execution_graph.passes.joined_projections import join_projections
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.memory import plan_buffers
from sagellm.runtime.execution_graph.passes.scheduling import schedule
from sagellm.runtime.execution_graph.tensors import StepSizes

DECODE = StepSizes(64, 64, 64, 64 * 1000, 64 * 1000)
PREFILL = StepSizes(8192, 4, 4, 8192, 4 * 2048 * 2049 // 2)
FUSIONS: tuple[Callable[[ExecutionGraph], ExecutionGraph], ...] = (
    join_projections,
    fuse_silu_multiply,
    fuse_add_norm,
    fuse_rotary_kv_write,
)
MODELS = (("Qwen/Qwen2.5-7B", 1), ("meta-llama/Llama-3.1-70B", 4), ("Qwen/Qwen3-30B-A3B", 1))


def main() -> None:
    profile = load_profile("h200/spec")
    assert isinstance(profile, AnalyticProfile)
    for name, tp in MODELS:
        print(f"\n{name}, tp {tp}: 64 decodes of 1000 tokens, prefill of 4 x 2048")
        print(f"{'':<28}{'nodes':>7}{'decode ms':>11}{'prefill ms':>12}")
        graph = build_graph(load_model_config(name), tp)
        _row("unfused", profile, graph)
        for fusion in FUSIONS:
            graph = fusion(graph)
            _row(fusion.__name__, profile, graph)
        _memory(graph)
        _kv_sends(profile, graph)


def _row(what: str, profile: AnalyticProfile, graph: ExecutionGraph) -> None:
    decode, prefill = (sum(node_prices(profile, graph, sizes).values()) / 1e6 for sizes in (DECODE, PREFILL))
    print(f"{what:<28}{len(graph.nodes):>7}{decode:>11.3f}{prefill:>12.2f}")


def _memory(graph: ExecutionGraph) -> None:
    plan = plan_buffers(graph, PREFILL)
    shared, unshared = plan.peak_bytes / 2**20, plan.unshared_bytes / 2**20
    print(f"activations of the prefill: {shared:,.0f} MiB in shared buffers, {unshared:,.0f} MiB without sharing")


def _kv_sends(profile: AnalyticProfile, graph: ExecutionGraph) -> None:
    """A prefill instance that hands its KV over: all at the end, or layer by layer beside later layers."""
    sending = add_kv_sends(graph)
    prices = node_prices(profile, sending, PREFILL)
    compute_ns = schedule(graph, lambda node: prices[node.name]).duration_ns
    sends_ns = sum(prices[node.name] for node in sending.nodes if isinstance(node.operator, KVSend))
    together_ns = schedule(sending, lambda node: prices[node.name]).duration_ns
    print(
        f"prefill with hand-over of its KV: {(compute_ns + sends_ns) / 1e6:.2f} ms with sends at the end, "
        f"{together_ns / 1e6:.2f} ms overlapped"
    )


if __name__ == "__main__":
    main()
