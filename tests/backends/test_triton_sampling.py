"""The drawing kernels, interpreted on the CPU, against the sampler in torch."""

import importlib.util
import os
from dataclasses import dataclass

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
from backends.cuda.kernels.sampling import draw_tokens, draw_with_floors
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
    scores = scores.double()
    least = min_p_floor(scores, min_p.double().log())
    scores = scores.masked_fill(scores < least, -torch.inf)
    every = torch.where(top_k == 0, scores.shape[1], top_k).clamp(max=scores.shape[1])
    top_p = torch.where(top_p < 1, top_p.double(), 2.0)  # beyond what rounding can reach
    return torch.maximum(least, top_floor(scores.sort(1, descending=True).values, every, top_p)).squeeze(1)


def noise_of(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    keys = torch.from_numpy(noise_keys(seeds.numpy().view(np.uint64), positions.numpy()))
    return exponential_noise(token_hashes(vocab_size, CPU), keys)


@pytest.mark.parametrize(("vocab_size", "spread"), [(33, 0.01), (33, 6.0), (4096, 1.0), (9001, 0.01), (9001, 6.0)])
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


TOP_K = (1, 5, 0, 300, 0, 700, 50, 0, 0, 0)
TOP_P = (1.0, 0.9, 0.3, 1.0, 1.0, 0.75, 0.99, 0.999, 0.9, 1.0)
MIN_P = (0.0, 0.0, 0.0, 0.05, 0.3, 0.0, 0.01, 0.0, 0.001, 0.0)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are cut in all ways, some not at all."""

    logits: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    cuts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def scores(self) -> torch.Tensor:
        return self.logits * (1 / self.temperature).unsqueeze(1)

    def kept(self) -> torch.Tensor:
        scores = self.scores()
        return scores >= expected_floors(scores, *self.cuts).unsqueeze(1)

    def expected(self) -> list[int]:
        noise = noise_of(self.seeds, self.positions, self.logits.shape[1])
        return (self.scores() - noise.log()).masked_fill(~self.kept(), -torch.inf).argmax(1).tolist()


def cut_rows(logits: torch.Tensor) -> Rows:
    num_rows = logits.shape[0]
    columns = (torch.tensor(column)[torch.arange(num_rows) % len(column)] for column in (TOP_K, TOP_P, MIN_P))
    places = torch.arange(num_rows), torch.arange(num_rows) * 3
    return Rows(logits, torch.full((num_rows,), 0.8), *places, tuple(columns))  # type: ignore[arg-type]


def assert_draws_what_is_kept(rows: Rows, num_more_max: int) -> None:
    found, _, floors = draw_with_floors(rows.logits, rows.temperature, rows.seeds, rows.positions, *rows.cuts)
    kept = rows.scores() >= floors.unsqueeze(1)
    assert (kept != rows.kept()).sum(1).le(num_more_max).all()
    assert found.tolist() == rows.expected()


@pytest.mark.parametrize(("spread", "vocab_size"), [(1.0, 33), (0.01, 9001), (1.0, 4097), (6.0, 9001)])
def test_cut_draws_are_those_of_the_sampler(spread: float, vocab_size: int) -> None:
    """Of few candidates, and of so many that the row is gone through: 9,001 tokens nearly all of which are kept."""
    # A sum of likelihoods is rounded, so a set that top_p ends may be longer or shorter by a token.
    assert_draws_what_is_kept(cut_rows(random_logits(len(TOP_K), vocab_size, spread, seed=7)), num_more_max=1)


def test_cut_draws_of_half_precision_keep_ties() -> None:
    """Thousands of equal scores: no more of them are kept than the sampler keeps, and no fewer."""
    logits = random_logits(len(TOP_K), 9001, 3.0, seed=11).to(torch.bfloat16).to(torch.float32)
    assert_draws_what_is_kept(cut_rows(logits), num_more_max=0)


def test_likely_tokens_may_all_lie_together() -> None:
    """In one group, and beside tokens that are barred: neither is where random logits put them."""
    logits = random_logits(len(TOP_K), 9001, 0.5, seed=5)
    logits[:, 4090:4110] += 9
    logits[:, 7000:] = -1e30
    assert_draws_what_is_kept(cut_rows(logits), num_more_max=1)


def test_equal_scores_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]])
    places, ones = torch.arange(2), torch.ones(2)
    floors = draw_with_floors(logits, ones, places, places, torch.tensor([2, 2]), ones, torch.zeros(2))[2]
    assert ((logits >= floors.unsqueeze(1)).sum(1)).tolist() == [4, 6]


def test_each_kind_of_cut_may_be_nobodys() -> None:
    logits, places = random_logits(4, 500, 2.0, seed=3), torch.arange(4)
    temperature = torch.tensor([1.0, 0.0]).repeat(2)
    nothing = (torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.zeros(4))
    uncut = draw_tokens(logits, temperature, places, places)[0]
    assert torch.equal(draw_tokens(logits, temperature, places, places, *nothing)[0], uncut)
    cuts = (torch.full((4,), 1), torch.full((4,), 0.05), torch.full((4,), 0.9))
    for index, cut in enumerate(cuts):
        all_but_one_neutral = [cut if place == index else neutral for place, neutral in enumerate(nothing)]
        alone = [cut if place == index else None for place in range(3)]
        found = draw_tokens(logits, temperature, places, places, *alone)[0]
        assert torch.equal(found, draw_tokens(logits, temperature, places, places, *all_but_one_neutral)[0])
        assert torch.equal(found[1::2], logits.argmax(1)[1::2])
        assert not torch.equal(found, uncut)


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
