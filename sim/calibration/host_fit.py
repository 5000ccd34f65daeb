"""The host's share of a step, from the difference between synchronous steps and asynchronous online runs.

With asynchronous scheduling the host works while the device does, so what an online client sees between
tokens is the device's share alone. Three constants come from that: what the host needs for a step, what
it needs for each sequence of it, and what a request needs on its way in and out.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sim.calibration.measured_steps import MeasuredRequest
from sim.calibration.step_fit import StepFit

MIN_OUTPUT_TOKENS = 20
SAME_STEP_US = 1500.0  # first tokens so close together came out of one step
BUDGET_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class HostFit:
    """Microseconds, beyond what the scheduler itself takes (``StepFit.schedule_*``)."""

    base_us: float
    seq_us: float
    request_overhead_us: float


@dataclass(frozen=True, slots=True)
class _Window:
    """One request's life between its first and its last token."""

    length_us: float
    num_seqs: float  # decoding, on average over the window
    num_context_tokens: float
    num_decode_steps: int
    prefills: tuple[tuple[int, ...], ...]  # prompt lengths, for each step that prefilled others

    @property
    def is_alone(self) -> bool:
        return not self.prefills and self.num_seqs < 1.001


def fit_host(fit: StepFit, runs: Sequence[Sequence[MeasuredRequest]]) -> HostFit:
    """The constants that make synchronous steps explain online runs that were not overloaded.

    Raises ``ValueError`` where no request of the runs ever decodes alone.
    """
    windows = [window for run in runs for window in _windows(run)]
    alone = [window for window in windows if window.is_alone]
    if not alone:
        raise ValueError("no request of the online files decodes alone; give a run with less load")
    base_us = statistics.median(
        fit.decode_us(1, window.num_context_tokens) - window.length_us / window.num_decode_steps for window in alone
    )
    seq_us = _seq_us(fit, windows, base_us)
    overheads = [value for run in runs for value in _overheads_us(fit, run, base_us, seq_us)]
    overhead_us = statistics.fmean(overheads) if overheads else 0.0
    return HostFit(base_us, seq_us, max(0.0, overhead_us))


def _seq_us(fit: StepFit, windows: Sequence[_Window], base_us: float) -> float:
    """The share of each sequence that makes the windows' lengths come out right, all together.

    A window's length is the sum of its steps' device shares, each of which is the synchronous time less
    ``base_us + seq_us * num_seqs``: linear in ``seq_us``.
    """
    excess_us = total_seqs = 0.0
    for window in windows:
        if window.num_decode_steps < MIN_OUTPUT_TOKENS:
            continue
        step_us = fit.decode_us(window.num_seqs, window.num_context_tokens) - base_us
        predicted_us = window.num_decode_steps * step_us
        num_seqs = window.num_decode_steps * window.num_seqs
        for prompts in window.prefills:
            predicted_us += _prefill_us(fit, window.num_seqs, window.num_context_tokens, prompts) - base_us
            num_seqs += window.num_seqs + len(prompts)
        excess_us += predicted_us - window.length_us
        total_seqs += num_seqs
    return max(0.0, excess_us / total_seqs) if total_seqs else 0.0


def _windows(run: Sequence[MeasuredRequest]) -> list[_Window]:
    """The decoding windows of the requests, unless others' prefills did not fit in one step."""
    windows = []
    for request in run:
        if request.num_output_tokens < MIN_OUTPUT_TOKENS:
            continue
        prefills = _prefills_within(run, request)
        num_decode_steps = request.num_output_tokens - 1 - len(prefills)
        if num_decode_steps < 1 or any(sum(prompts) > BUDGET_TOKENS for prompts in prefills):
            continue
        start_us, end_us = request.first_token_us, request.last_token_us
        length_us = end_us - start_us
        seqs_us = context_us = 0.0
        for other in run:
            overlap_us = min(end_us, other.last_token_us) - max(start_us, other.first_token_us)
            if overlap_us <= 0:
                continue
            middle_us = (min(end_us, other.last_token_us) + max(start_us, other.first_token_us)) / 2
            share = (middle_us - other.first_token_us) / (other.last_token_us - other.first_token_us)
            seqs_us += overlap_us
            context_us += overlap_us * (other.num_prompt_tokens + share * other.num_output_tokens)
        windows.append(_Window(length_us, seqs_us / length_us, context_us / length_us, num_decode_steps, prefills))
    return windows


def _prefills_within(run: Sequence[MeasuredRequest], request: MeasuredRequest) -> tuple[tuple[int, ...], ...]:
    """Prompt lengths of requests whose first token fell into the window, grouped by step."""
    inside = sorted(
        (other.first_token_us, other.num_prompt_tokens)
        for other in run
        if request.first_token_us < other.first_token_us <= request.last_token_us
    )
    groups: list[list[int]] = []
    last_us = float("-inf")
    for first_token_us, num_prompt_tokens in inside:
        if first_token_us - last_us < SAME_STEP_US:
            groups[-1].append(num_prompt_tokens)
        else:
            groups.append([num_prompt_tokens])
        last_us = first_token_us
    return tuple(tuple(group) for group in groups)


def _prefill_us(fit: StepFit, num_seqs: float, num_context_tokens: float, prompts: tuple[int, ...]) -> float:
    pairs = sum(prompt * prompt / 2 for prompt in prompts)
    return fit.mixed_us(num_seqs + sum(prompts), pairs, num_context_tokens)


def _overheads_us(fit: StepFit, run: Sequence[MeasuredRequest], base_us: float, seq_us: float) -> list[float]:
    """What is left of TTFT after waiting and prefill, for requests that met nothing but decodes.

    A request that arrives while a step runs joins the step after the next: it waits for half a step and
    a whole one, on average.
    """
    overheads = []
    for request in run:
        others = [
            other
            for other in run
            if other is not request
            and other.sent_us <= request.first_token_us
            and other.last_token_us >= request.sent_us
        ]
        decoding = [other for other in others if other.first_token_us < request.sent_us - 2000]
        if not decoding or len(decoding) < len(others) or request.num_prompt_tokens > BUDGET_TOKENS:
            continue
        num_seqs = len(decoding)
        context = sum(_context_at(other, request.sent_us) for other in decoding)
        step_us = fit.decode_us(num_seqs, context) - base_us - seq_us * num_seqs
        prompts = (request.num_prompt_tokens,)
        prefill_us = _prefill_us(fit, num_seqs, context, prompts) - base_us - seq_us * (num_seqs + 1)
        overheads.append(request.first_token_us - request.sent_us - 1.5 * step_us - prefill_us)
    return overheads


def _context_at(request: MeasuredRequest, time_us: float) -> float:
    share = (time_us - request.first_token_us) / max(1.0, request.last_token_us - request.first_token_us)
    return request.num_prompt_tokens + min(1.0, max(0.0, share)) * request.num_output_tokens
