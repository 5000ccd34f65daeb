"""The drawing kernels, interpreted on the CPU, against the sampler in torch."""

import importlib.util
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from backends.base import DrawTokens
from backends.conformance.check import Check, ConformanceError, Subject
from backends.conformance.drawing_checks import drawing_checks
from backends.cpu.backend import CpuBackend
from backends.cuda.kernels.cutoff_floors import cutoff_floors
from backends.cuda.kernels.sampling import draw_tokens
from backends.model_runner.sampler.cutoff import min_p_floor, top_floor
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.model_runner.sampler.noise_keys import noise_keys
from backends.operators.registry import KernelRegistry

# Interpreted, a division of zero or an overflow is numpy's to warn of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")


def random_logits(num_rows: int, vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    return spread * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def expected_floors(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    scores = scores.masked_fill(scores < min_p_floor(scores, min_p.log()), -torch.inf)
    vocab_size = scores.shape[1]
    every = torch.where(top_k == 0, vocab_size, top_k)
    return top_floor(scores.sort(1, descending=True).values, every, top_p).squeeze(1)


def noise_of(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    keys = torch.from_numpy(noise_keys(seeds.numpy().view(np.uint64), positions.numpy()))
    return exponential_noise(token_hashes(vocab_size, CPU), keys)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("vocab_size", [33, 4096, 9001])
def test_uncut_draws_are_those_of_the_sampler(vocab_size: int, spread: float) -> None:
    num_rows = 12
    logits = random_logits(num_rows, vocab_size, spread, seed=vocab_size)
    generator = torch.Generator().manual_seed(1)
    temperature = 0.3 + torch.rand(num_rows, generator=generator)
    temperature[::4] = 0.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 5000, (num_rows,), generator=generator)
    found, is_invalid = draw_tokens(logits, temperature, seeds, positions)
    scores = logits / temperature.unsqueeze(1) - noise_of(seeds, positions, vocab_size).log()
    expected = torch.where(temperature == 0, logits.argmax(1), scores.argmax(1))
    assert found.tolist() == expected.tolist()
    assert not is_invalid.any()


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_cut_draws_are_those_of_the_sampler(spread: float) -> None:
    top_k = torch.tensor([1, 5, 0, 300, 0, 700, 50, 0])
    top_p = torch.tensor([1.0, 0.9, 0.3, 1.0, 1.0, 0.75, 0.99, 0.999])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.05, 0.3, 0.0, 0.01, 0.0])
    num_rows, vocab_size = top_k.numel(), 5000
    logits = random_logits(num_rows, vocab_size, spread, seed=7)
    temperature, seeds, positions = torch.full((num_rows,), 0.8), torch.arange(num_rows), torch.arange(num_rows) * 3
    found, _ = draw_tokens(logits, temperature, seeds, positions, top_k, top_p, min_p)
    scores = logits / 0.8
    kept = scores >= expected_floors(scores, top_k, top_p, min_p).unsqueeze(1)
    floors = cutoff_floors(logits, temperature, top_k, top_p, min_p).unsqueeze(1)
    # A sum of likelihoods is rounded, so a set that top_p ends may be longer or shorter by a token.
    assert ((logits * (1 / temperature.unsqueeze(1)) >= floors) != kept).sum(1).le(1).all()
    expected = (scores - noise_of(seeds, positions, vocab_size).log()).masked_fill(~kept, -torch.inf).argmax(1)
    assert found.tolist() == expected.tolist()


def test_equal_scores_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]])
    floors = cutoff_floors(logits, torch.ones(2), torch.tensor([2, 2]), None, None)
    assert ((logits >= floors.unsqueeze(1)).sum(1)).tolist() == [4, 6]


def test_each_kind_of_cut_may_be_nobodys() -> None:
    logits = random_logits(2, 500, 2.0, seed=3)
    temperature, nothing = torch.tensor([1.0, 0.0]), (torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(2))
    assert cutoff_floors(logits, temperature, *nothing).tolist() == [-torch.inf, -torch.inf]
    cuts = (torch.tensor([9, 9]), torch.tensor([0.4, 0.4]), torch.tensor([0.2, 0.2]))
    for index, cut in enumerate(cuts):
        all_but_one_neutral = [cut if place == index else neutral for place, neutral in enumerate(nothing)]
        alone = [cut if place == index else None for place in range(3)]
        found = cutoff_floors(logits, temperature, *alone)
        assert torch.equal(found, cutoff_floors(logits, temperature, *all_but_one_neutral))
        assert found[0] > -torch.inf
        assert found[1] == -torch.inf


def test_what_is_not_finite_is_told_and_draws_a_token_of_the_vocabulary() -> None:
    logits = torch.zeros(5, 5000)
    logits[0, 4999], logits[1, 0], logits[2, 4500] = torch.nan, torch.inf, -torch.inf
    logits[3] = torch.nan
    cuts = (torch.full((5,), 20), torch.full((5,), 0.9), torch.full((5,), 0.1))
    for temperature in (0.0, 1.0):
        for cut in ((None, None, None), cuts):
            places = torch.full((5,), temperature), torch.arange(5), torch.arange(5)
            token_ids, is_invalid = draw_tokens(logits, *places, *cut)
            assert is_invalid.tolist() == [True, True, True, True, False]
            assert ((token_ids >= 0) & (token_ids < 5000)).all()


class DrawsByKernel(CpuBackend):
    def token_drawing(self) -> DrawTokens:
        return draw_tokens


class ForgetsPositions(CpuBackend):
    def token_drawing(self) -> DrawTokens:
        def draw(logits, temperature, seeds, positions, *cuts):  # type: ignore[no-untyped-def]
            return draw_tokens(logits, temperature, seeds, torch.zeros_like(positions), *cuts)

        return draw


class ForgetsCuts(CpuBackend):
    def token_drawing(self) -> DrawTokens:
        return lambda logits, temperature, seeds, positions, *_: draw_tokens(logits, temperature, seeds, positions)


SMALL = [check for check in drawing_checks() if "5 tokens" in check.name or "a few likely" in check.name]


@pytest.mark.parametrize("check", SMALL, ids=lambda check: check.name)
def test_the_kernel_passes_conformance(check: Check) -> None:
    check.run(Subject(DrawsByKernel(), KernelRegistry()))


@pytest.mark.parametrize("faulty", [ForgetsPositions, ForgetsCuts])
def test_conformance_finds_faults_of_drawing(faulty: type[CpuBackend]) -> None:
    with pytest.raises(ConformanceError, match=r"which is .* behind token"):
        SMALL[-1].run(Subject(faulty(), KernelRegistry()))
