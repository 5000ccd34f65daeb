"""Fits the rates of a profile family: what one engine's steps take beyond their measured GEMMs.

The family prices any dense model from GEMM times of the same card, plus a few constants. Those that
no operator benchmark gives are fitted here to the steps of one model, so that they carry over to others:
each belongs to a layer, a sequence, a byte or an operation.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sagellm.cost_model.analytic import decode_sizes, mixed_sizes, pair_flops
from sagellm.cost_model.graph_prices import GraphPrices, engine_graph, make_graph_prices
from sagellm.cost_model.profile import AnalyticProfile, GemmTable
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.tensors import StepSizes
from sim.calibration.host_fit import HostFit
from sim.calibration.measured_steps import MeasuredStep
from sim.calibration.regression import fit_relative
from sim.calibration.step_fit import CONTEXT_KNOTS, StepFit, padded

LAUNCH_BOUND_KNOTS = (8, 64, 128)  # tokens of steps that the host cannot launch as fast as they run
GRAPH_BOUND_KNOTS = (256, 512)
STEP_FACTOR_KNOTS = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class _Operators:
    """Nanoseconds of one model's operators by number of tokens, before any correction."""

    prices: GraphPrices
    model: ModelShape

    @property
    def profile(self) -> AnalyticProfile:
        return self.prices.profile

    def layer_gemm_ns(self, num_tokens: int) -> float:
        return self.prices.gemm_ns(StepSizes(num_tokens=num_tokens))

    def decode_ns(self, num_seqs: int) -> float:
        return self.prices.work_ns(decode_sizes(num_seqs))

    def mixed_ns(self, num_tokens: int) -> float:
        return self.prices.work_ns(mixed_sizes(num_tokens))


def fit_family(
    start: AnalyticProfile, model: ModelShape, steps: Sequence[MeasuredStep], fit: StepFit, host: HostFit
) -> AnalyticProfile:
    """The profile ``start`` with its fitted constants put in. Its GEMM table must be uncorrected.

    ``fit`` must have been made with the host's share of each sequence taken off.
    """
    operators = _Operators(make_graph_prices(start, engine_graph(model, 1)), model)
    layer_fixed_ns, seq_ns = _fixed_and_seq_ns(operators, steps, fit, host)
    fixed_ns = model.num_layers * layer_fixed_ns + start.rates.step_fixed_ns
    mixed_fixed_ns = _mixed_fixed_ns(operators, fit, host, fixed_ns)
    peak_gbps = start.device.memory_gbps
    read_bytes = operators.prices.attention_work(StepSizes(num_context_tokens=1)).kv_read_bytes
    flops = pair_flops(operators.prices)
    rates = replace(
        start.rates,
        attention_compute_efficiency=_short(flops / (fit.token_pair_us * 1e6 * start.device.bf16_tflops)),
        attention_read_tiles=tuple(knot * model.num_kv_heads for knot in CONTEXT_KNOTS),
        attention_read_efficiency=tuple(
            _short(read_bytes / (context_us * 1e3 * peak_gbps)) for context_us in fit.decode_context_us
        ),
        mixed_attention_read_efficiency=_short(read_bytes / (fit.mixed_context_us * 1e3 * peak_gbps)),
        layer_fixed_ns=round(layer_fixed_ns),
        mixed_layer_fixed_ns=round(mixed_fixed_ns / model.num_layers),
        seq_ns=round(seq_ns),
    )
    launch_us = statistics.median(fit.mixed_us(size, 0, 0) for size in LAUNCH_BOUND_KNOTS) - host.base_us
    host_constants = replace(
        start.host,
        base_ns=round((fit.schedule_base_us + host.base_us) * 1e3),
        seq_ns=round((fit.schedule_seq_us + host.seq_us) * 1e3),
        launch_layer_ns=round(launch_us * 1e3 / model.num_layers),
        request_overhead_ns=round(host.request_overhead_us * 1e3),
    )
    assert start.gemm_table is not None
    table = _corrected(start.gemm_table, operators, fit, host, fixed_ns + mixed_fixed_ns)
    return replace(start, rates=rates, host=host_constants, gemm_table=table)


def _fixed_and_seq_ns(
    operators: _Operators, steps: Sequence[MeasuredStep], fit: StepFit, host: HostFit
) -> tuple[float, float]:
    """What decode-only steps take beyond GEMMs, streaming and context: for each layer, and each sequence."""
    rows: list[list[float]] = []
    targets: list[float] = []
    for step in steps:
        if not step.steady:
            continue
        size = padded(step.num_decode_seqs)
        context_us = fit.decode_us(size, step.num_decode_context_tokens) - fit.decode_us(size, 0)
        sync_us = step.duration_us - step.schedule_us - host.base_us - host.seq_us * step.num_decode_seqs
        known_us = operators.decode_ns(size) / 1e3 + context_us
        known_us += operators.profile.rates.step_fixed_ns / 1e3
        # The relative error of the whole step is what counts, so the known part stays in as a column.
        rows.append([operators.model.num_layers, size, known_us])
        targets.append(sync_us)
    coefficients, _ = fit_relative(
        [[layers, size] for layers, size, _ in rows],
        [target - known for target, (_, _, known) in zip(targets, rows, strict=True)],
    )
    return max(0.0, float(coefficients[0]) * 1e3), max(0.0, float(coefficients[1]) * 1e3)


def _mixed_fixed_ns(operators: _Operators, fit: StepFit, host: HostFit, fixed_ns: float) -> float:
    """What steps with chunks take more than the sum of their operators, where they are not bound by launches."""
    excess_ns = []
    for num_tokens in GRAPH_BOUND_KNOTS:
        device_us = fit.mixed_us(num_tokens, 0, 0) - host.base_us
        excess_ns.append(device_us * 1e3 - fixed_ns - operators.mixed_ns(num_tokens))
    return max(0.0, statistics.fmean(excess_ns))


def _corrected(table: GemmTable, operators: _Operators, fit: StepFit, host: HostFit, fixed_ns: float) -> GemmTable:
    """The table with the factor that large GEMMs take inside a step.

    The benchmark runs nothing but one GEMM, at the card's power limit; in a step they alternate with
    operators that draw less, and short steps with pauses.
    """
    factors = []
    for num_tokens in STEP_FACTOR_KNOTS[1:]:
        device_us = fit.mixed_us(num_tokens, 0, 0) - host.base_us
        gemm_ns = operators.layer_gemm_ns(num_tokens)
        other_ns = fixed_ns + operators.mixed_ns(num_tokens) - gemm_ns
        factors.append(_short((device_us * 1e3 - other_ns) / gemm_ns))
    return replace(table, step_factor_num_tokens=STEP_FACTOR_KNOTS, step_factor=(1.0, *factors))


def _short(value: float) -> float:
    return round(value, 4)
