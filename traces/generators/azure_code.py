"""``azure-code``: fitted to the Azure LLM inference trace 2023, code (CC-BY 4.0; Splitwise, ISCA'24).

Bursts at three levels: clusters of micro-bursts of requests. Between clusters 5 s and a lognormal;
between micro-bursts a lognormal, clipped, times a factor of the cluster; a micro-burst has a geometric
number of requests 2.7 ms apart. Good to about a quarter: mean of 80 hours IDC 10.6/26/62/110/151/245 in
windows of 1/3/10/30/60/300 s, where the trace has 13.2/32/72/124/164/138 (the last from 11 windows only).
"""

import numpy as np
import numpy.typing as npt

from traces.generators.assemble import trace_of
from traces.generators.contract import GeneratorParameters
from traces.generators.lengths import draw_lengths
from traces.request_trace import Trace

_CLUSTER_GAP_MINIMUM_S = 5.0
_CLUSTER_GAP_MEDIAN_S, _CLUSTER_GAP_SIGMA = 17.05, 1.436
_CLUSTER_SIZE_MEDIAN, _CLUSTER_SIZE_SIGMA = 69.9, 0.754  # micro-bursts
_MICRO_GAP_MEDIAN_S, _MICRO_GAP_SIGMA = 0.124, 0.80
_MICRO_GAP_RANGE_S = (0.02, 5.0)
_CLUSTER_FACTOR_MU, _CLUSTER_FACTOR_SIGMA = -0.06, 0.35
_MICRO_SIZE_PROBABILITY = 0.588
_MICRO_SPACING_S = 0.0027


def generate_trace(parameters: GeneratorParameters) -> Trace:
    """Lengths from the joint fit, arrivals in bursts."""
    rng = np.random.default_rng(parameters.seed)
    prompts, outputs = draw_lengths("azure-code", parameters.num_requests, rng)
    clusters: list[npt.NDArray[np.float64]] = []
    num_drawn, end_s = 0, 0.0
    while num_drawn < parameters.num_requests:
        gap_s = _CLUSTER_GAP_MINIMUM_S + _lognormal(_CLUSTER_GAP_MEDIAN_S, _CLUSTER_GAP_SIGMA, 1, rng)[0]
        cluster = end_s + gap_s + _cluster_s(rng)
        clusters.append(cluster)
        end_s = float(cluster[-1])
        num_drawn += len(cluster)
    return trace_of(np.concatenate(clusters)[: parameters.num_requests], prompts, outputs)


def _cluster_s(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Arrivals of one cluster, sorted, from its first one on."""
    num_micro = max(1, round(float(_lognormal(_CLUSTER_SIZE_MEDIAN, _CLUSTER_SIZE_SIGMA, 1, rng)[0])))
    factor = np.exp(rng.normal(_CLUSTER_FACTOR_MU, _CLUSTER_FACTOR_SIGMA))
    gaps_s = factor * np.clip(_lognormal(_MICRO_GAP_MEDIAN_S, _MICRO_GAP_SIGMA, num_micro, rng), *_MICRO_GAP_RANGE_S)
    gaps_s[0] = 0.0
    sizes = rng.geometric(_MICRO_SIZE_PROBABILITY, num_micro)
    first_of_micro = np.cumsum(sizes) - sizes
    place_in_micro = np.arange(sizes.sum()) - np.repeat(first_of_micro, sizes)
    arrivals_s = np.repeat(np.cumsum(gaps_s), sizes) + place_in_micro * _MICRO_SPACING_S
    return np.sort(arrivals_s)


def _lognormal(median: float, sigma: float, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return median * np.exp(sigma * rng.standard_normal(count))
