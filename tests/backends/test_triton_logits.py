"""The kernels of penalties, log-probabilities and drawn tokens, interpreted on the CPU, against torch."""

import importlib.util
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from backends.base import LogitKernels
from backends.conformance.check import Check, ConformanceError, Subject
from backends.conformance.logit_kernel_checks import logit_kernel_checks
from backends.cpu.backend import CpuBackend
from backends.cuda.kernels.drawn_tokens import keep_drawn
from backends.cuda.kernels.logit_kernels import TritonLogitKernels
from backends.cuda.kernels.sampling import draw_tokens
from backends.cuda.kernels.token_logprobs import report_logprobs
from backends.cuda.kernels.token_penalties import penalise
from backends.model_runner.packed_arrays import ArrayPacker, StagingBuffer
from backends.model_runner.sampler.device_draw_plan import PackedDrawPlan
from backends.model_runner.sampler.draw_plan import plan_drawing
from backends.model_runner.sampler.logprob_report import DrawnLogprobs, num_report_words, write_logprobs
from backends.model_runner.sampler.parameter_table import ParameterTable
from backends.model_runner.sampler.penalties import penalise_output, penalise_repetition
from backends.model_runner.sampler.sampler import DrawnTokens, Sampler
from backends.operators.registry import KernelRegistry
from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import SamplingParameters

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
VOCAB_SIZE = 5000  # more than one part


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


PENALTIES = {
    "all": (1.3, 0.5, 0.2),
    "repetition": (0.8, 0.0, 0.0),
    "presence": (1.0, -0.4, 0.0),
    "frequency": (1.0, 0.0, 0.3),
    "none": (1.0, 0.0, 0.0),
}


def test_penalties_are_those_of_torch() -> None:
    """Rows of a few tokens and of several blocks of them, most of which occur many times, some in the prompt alone."""
    table = torch.randint(0, 60, (9, 2600), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    table[:, 0] = torch.arange(9)  # those of rows that have no output
    rows, table_rows = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([8, 1, 4, 3, 0])
    num_tokens, num_prompt_tokens = torch.tensor([2500, 1, 1024, 30, 1500]), torch.tensor([1100, 1, 1024, 29, 1])
    penalties = torch.tensor(list(PENALTIES.values())).T.contiguous()
    for turn in range(len(PENALTIES)):
        turned = penalties.roll(turn, 1)
        expected, found = random_logits(7), random_logits(7)
        token_ids = table[:, :2500].index_select(0, table_rows).to(torch.int64)
        penalise_repetition(expected, rows, token_ids, num_tokens, turned[0])
        penalise_output(expected, rows, token_ids, num_tokens, num_prompt_tokens, turned[1:])
        penalise(found, torch.stack((rows, table_rows, num_tokens, num_prompt_tokens)), turned, table, 2500)
        assert torch.equal(found, expected)
        assert not torch.equal(found, random_logits(7))


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_those_of_torch(num_top: int) -> None:
    logits = random_logits(5, seed=num_top)
    logits[1] = logits[1].to(torch.bfloat16).to(torch.float32)  # has ties
    rows = torch.tensor([0, 1, 2, 4])
    token_ids = torch.randint(0, VOCAB_SIZE, (5,), generator=torch.Generator().manual_seed(2))
    token_ids[2] = logits[2].argmax()
    reports = [DrawnLogprobs(torch.full((4, num_report_words(num_top)), -7, dtype=torch.int32)) for _ in range(2)]
    report_logprobs(logits, rows, token_ids, num_top, reports[0].words)
    write_logprobs(logits[rows], token_ids[rows], num_top, reports[1])
    found, expected = reports
    assert torch.equal(found.drawn_ranks, expected.drawn_ranks)
    assert torch.equal(found.token_ids[:, 0].long(), token_ids[rows])
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-5)
    raw = logits[rows].gather(1, found.token_ids.long())
    assert torch.equal(raw[:, 1:], logits[rows].topk(num_top, 1).values)
    for ids in found.token_ids[:, 1:].tolist():
        assert len(set(ids)) == num_top


def test_of_equally_likely_tokens_the_first_are_reported() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, 4500] = 1.0
    report = DrawnLogprobs(torch.empty((2, num_report_words(4)), dtype=torch.int32))
    report_logprobs(logits, torch.arange(2), torch.tensor([7, 8]), 4, report.words)
    assert report.token_ids.tolist() == [[7, 4500, 0, 1, 2], [8, 0, 1, 2, 3]]
    assert report.drawn_ranks.tolist() == [2, 1]


def test_drawn_tokens_go_to_their_requests_and_to_the_host() -> None:
    num_rows = 300
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(400, 16, dtype=torch.int32)
    cells = torch.randperm(table.numel(), generator=generator)[:num_rows]
    token_ids = torch.randint(1, VOCAB_SIZE, (num_rows,), generator=generator)
    is_invalid = torch.rand(num_rows, generator=generator) < 0.1
    outcome = torch.full((num_rows + 5,), -7, dtype=torch.int32)
    keep_drawn(token_ids, is_invalid, cells, table, outcome[:num_rows])
    expected = torch.zeros_like(table)
    expected.view(-1)[cells] = token_ids.to(torch.int32)
    assert torch.equal(table, expected)
    assert outcome.tolist() == [*torch.where(is_invalid, -1, token_ids).tolist(), *[-7] * 5]


WISHES = (
    SamplingParameters(temperature=0.0),
    SamplingParameters(temperature=0.9, top_p=0.9, num_logprobs=3),
    SamplingParameters(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, num_logprobs=0),
    SamplingParameters(temperature=0.7, frequency_penalty=0.4, top_k=30, min_p=0.01),
    SamplingParameters(temperature=0.0, logit_bias=((77, 90.0),), num_logprobs=2),
)


def drawn_by(sampler: Sampler, *, by_kernel: bool) -> DrawnTokens:
    table = ParameterTable(VOCAB_SIZE, len(WISHES))
    for row, sampling in enumerate(WISHES):
        table.fill(row, RequestSpec(RequestId("r"), 0, 4, 100, sampling=sampling))
    token_table = torch.randint(0, 40, (len(WISHES), 32), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    num_tokens = np.array([4, 9, 20, 15, 30])
    plan = plan_drawing(table, np.arange(len(WISHES)), num_tokens, VOCAB_SIZE, by_kernel=by_kernel)
    packer = ArrayPacker(StagingBuffer(is_pinned=False))
    packed = PackedDrawPlan(plan, packer)
    return sampler.draw(random_logits(len(WISHES), seed=3), packed.on(packer.copy_to(CPU)), token_table)


def test_a_sampler_with_kernels_draws_and_reports_as_one_without() -> None:
    expected = drawn_by(Sampler(VOCAB_SIZE, CPU), by_kernel=False)
    found = drawn_by(Sampler(VOCAB_SIZE, CPU, draw_tokens, TritonLogitKernels()), by_kernel=True)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.is_invalid, expected.is_invalid)
    assert found.logprobs is not None
    assert expected.logprobs is not None
    assert torch.equal(found.logprobs.token_ids, expected.logprobs.token_ids)
    assert torch.equal(found.logprobs.drawn_ranks, expected.logprobs.drawn_ranks)
    assert torch.allclose(found.logprobs.logprobs, expected.logprobs.logprobs, atol=1e-5)


class HasLogitKernels(CpuBackend):
    def logit_kernels(self) -> LogitKernels:
        return TritonLogitKernels()


class SwapsArguments(HasLogitKernels):
    """Takes presence for frequency, the row after the reported one, and tells of invalid tokens."""

    def logit_kernels(self) -> LogitKernels:
        kernels = TritonLogitKernels()
        kernels.penalise = lambda logits, places, penalties, *rest: penalise(  # type: ignore[method-assign]
            logits, places, penalties[[0, 2, 1]].contiguous(), *rest
        )
        kernels.report_logprobs = lambda logits, rows, *rest: report_logprobs(  # type: ignore[method-assign]
            logits, rows.roll(1), *rest
        )
        kernels.keep_drawn = lambda token_ids, is_invalid, *rest: keep_drawn(  # type: ignore[method-assign]
            token_ids, torch.zeros_like(is_invalid), *rest
        )
        return kernels


SMALL = [check for check in logit_kernel_checks() if "152064" not in check.name]


@pytest.mark.parametrize("check", SMALL, ids=lambda check: check.name)
def test_the_kernels_pass_conformance(check: Check) -> None:
    check.run(Subject(HasLogitKernels(), KernelRegistry()))


@pytest.mark.parametrize("check", SMALL, ids=lambda check: check.name)
def test_conformance_finds_faults_of_the_kernels(check: Check) -> None:
    with pytest.raises(ConformanceError):
        check.run(Subject(SwapsArguments(), KernelRegistry()))
