"""Arrivals with independent gaps: ``poisson``, ``gamma`` and, since its source has no times, ``arxiv-summ``."""

import numpy as np

from traces.generators.assemble import trace_of
from traces.generators.contract import GeneratorParameters
from traces.generators.lengths import draw_lengths
from traces.request_trace import Trace


def generate_trace(parameters: GeneratorParameters) -> Trace:
    """Gamma-distributed gaps of the given CV; at CV 1 these are exponential, and arrivals Poisson."""
    rng = np.random.default_rng(parameters.seed)
    prompts, outputs = draw_lengths(parameters.lengths, parameters.num_requests, rng)
    shape = parameters.cv**-2
    gaps_s = rng.gamma(shape, 1 / (shape * parameters.rate_rps), parameters.num_requests)
    return trace_of(np.cumsum(gaps_s), prompts, outputs)
