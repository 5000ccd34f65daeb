"""A planner that looks up once what stays gives the plans that are made anew."""

from dataclasses import astuple

import numpy as np
import pytest

from backends.model_runner.sampler.draw_plan import DrawPlan, plan_drawing
from backends.model_runner.sampler.draw_planner import DrawPlanner
from backends.model_runner.sampler.parameter_table import ParameterTable
from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters

VOCAB_SIZE = 50
KINDS = {
    "greedy": (GREEDY,),
    "temperature": (SamplingParameters(seed=9), GREEDY),
    "cut-offs": (SamplingParameters(top_p=0.9), SamplingParameters(top_k=4), GREEDY),
    "penalties": (GREEDY, SamplingParameters(repetition_penalty=1.2), SamplingParameters(frequency_penalty=0.5)),
    "logprobs": (SamplingParameters(num_logprobs=3), GREEDY, SamplingParameters(num_logprobs=0)),
    "edits": (SamplingParameters(min_tokens=4, repetition_penalty=1.3), SamplingParameters(bad_words=((1, 2),))),
}


def filled(samplings: tuple[SamplingParameters, ...], num_rows: int = 6) -> ParameterTable:
    table = ParameterTable(VOCAB_SIZE, num_rows)
    for row in range(num_rows):
        sampling = samplings[row % len(samplings)]
        table.fill(row, RequestSpec(RequestId("r"), 0, row + 1, 99, sampling=sampling, stop_token_ids=(7,)))
    return table


def assert_equal(found: DrawPlan, expected: DrawPlan) -> None:
    for ours, theirs in zip(found_parts(found), found_parts(expected), strict=True):
        assert type(ours) is type(theirs)
        assert np.array_equal(ours, theirs)


def found_parts(plan: DrawPlan) -> list[object]:
    parts: list[object] = []
    for part in astuple(plan):
        parts.extend(part if isinstance(part, tuple) and part and isinstance(part[0], np.ndarray) else [part])
    return [np.zeros(0) if part is None else part for part in parts]


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_one_step_after_the_other_are_those_made_anew(kind: str, by_kernel: bool) -> None:
    table = filled(KINDS[kind])
    planner = DrawPlanner(table, VOCAB_SIZE, by_kernel=by_kernel)
    rows = np.array([4, 0, 5, 2, 1], np.int64)
    for step in range(4):
        num_tokens = table.num_prompt_tokens[rows] + step * 2
        found = planner.plan(rows, num_tokens)
        assert_equal(found, plan_drawing(table, rows, num_tokens, VOCAB_SIZE, by_kernel=by_kernel))


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_and_requests_are_planned_anew(kind: str) -> None:
    table = filled(KINDS[kind])
    planner = DrawPlanner(table, VOCAB_SIZE, by_kernel=True)
    rows, other_rows = np.array([4, 0, 5], np.int64), np.array([0, 1], np.int64)

    def check(some_rows: np.ndarray) -> None:  # type: ignore[type-arg]
        num_tokens = table.num_prompt_tokens[some_rows] + 3
        found = planner.plan(some_rows, num_tokens)
        assert_equal(found, plan_drawing(table, some_rows, num_tokens, VOCAB_SIZE, by_kernel=True))

    check(rows)
    check(other_rows)
    check(rows)
    check(rows)
    new = SamplingParameters(temperature=0.4, presence_penalty=1.0, num_logprobs=1)
    table.fill(0, RequestSpec(RequestId("new"), 0, 3, 99, sampling=new))
    check(rows)
    table.refuse(5)
    check(rows)
