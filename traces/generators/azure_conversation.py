"""``azure-conv``: fitted to the Azure LLM inference trace 2023, conversation (CC-BY 4.0; Splitwise, ISCA'24).

Arrivals are a doubly stochastic Poisson process: the rate is 5.53/s times exp(a + b - var / 2), with a
an Ornstein-Uhlenbeck process (standard deviation 0.26, correlation time 600 s) and b independent from
second to second (0.22). Mean of 80 hours: IDC 1.49/2.07/3.9/9.1/16.5/64 in windows of 1/3/10/30/60/300 s, where
the trace has 1.39/1.97/3.86/8.87/16.1/56, and CV of the times between arrivals 1.08 (1.09).
"""

import math

import numpy as np
import numpy.typing as npt

from traces.generators.assemble import trace_of
from traces.generators.contract import GeneratorParameters
from traces.generators.lengths import draw_lengths
from traces.request_trace import Trace

_SLOW_SD = 0.26
_CORRELATION_TIME_S = 600
_FAST_SD = 0.22


def generate_trace(parameters: GeneratorParameters) -> Trace:
    """Lengths from the joint fit, arrivals from the doubly stochastic process."""
    rng = np.random.default_rng(parameters.seed)
    prompts, outputs = draw_lengths("azure-conv", parameters.num_requests, rng)
    return trace_of(_arrivals_s(parameters.num_requests, parameters.rate_rps, rng), prompts, outputs)


def _arrivals_s(num_requests: int, rate_rps: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Sorted arrival times, drawn in stretches of seconds until there are enough."""
    stretches: list[npt.NDArray[np.float64]] = []
    slow = _SLOW_SD * float(rng.standard_normal())
    num_drawn = start_s = 0
    while num_drawn < num_requests:
        num_seconds = max(60, math.ceil((num_requests - num_drawn) / rate_rps))
        counts, slow = _counts_per_second(num_seconds, rate_rps, slow, rng)
        second = np.repeat(np.arange(start_s, start_s + num_seconds), counts)
        stretches.append(np.sort(second + rng.random(len(second))))
        num_drawn += len(second)
        start_s += num_seconds
    return np.concatenate(stretches)[:num_requests]


def _counts_per_second(
    num_seconds: int, rate_rps: float, slow: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], float]:
    """Arrivals in each second, and the slow process after the last; ``slow`` is its value before the first."""
    decay = math.exp(-1 / _CORRELATION_TIME_S)
    innovation = _SLOW_SD * math.sqrt(1 - decay**2)
    path = np.empty(num_seconds)
    for second, step in enumerate(rng.standard_normal(num_seconds).tolist()):
        slow = decay * slow + innovation * step
        path[second] = slow
    fast = _FAST_SD * rng.standard_normal(num_seconds)
    rates = rate_rps * np.exp(path + fast - (_SLOW_SD**2 + _FAST_SD**2) / 2)
    return rng.poisson(rates), slow
