"""The kernel that draws tokens, where a backend has one: what it draws is what the sampler's noise says."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from backends.base import DrawTokens
from backends.conformance.check import Check, Subject, claimed, expect
from backends.model_runner.sampler.cutoff import min_p_floor, top_floor
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.model_runner.sampler.noise_keys import noise_keys

_NEAR = 2e-4  # between two values that rounding may swap


@dataclass(frozen=True, slots=True)
class DrawingCase:
    """``cuts`` are (top_k, top_p, min_p) of the rows in turn; ``spread`` is of the logits."""

    title: str
    num_rows: int
    vocab_size: int
    spread: float
    cuts: tuple[tuple[int, float, float], ...] = ()


_CUTS = (
    (1, 1.0, 0.0),
    (40, 1.0, 0.0),
    (1000, 0.8, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.1),
    (50, 0.9, 0.02),
)
_CASES = (
    DrawingCase("all of 152064 tokens", 33, 152_064, 2.0),
    DrawingCase("all of 5 tokens", 64, 5, 1.0),
    DrawingCase("all of 50257 likely tokens", 8, 50_257, 1e-3),
    DrawingCase("what cut-offs leave of 152064 tokens", 35, 152_064, 2.0, _CUTS),
    DrawingCase("what cut-offs leave of 32000 likely tokens", 35, 32_000, 1e-3, _CUTS),
    DrawingCase("what cut-offs leave of a few likely tokens", 14, 4097, 3.0, _CUTS),
)


def drawing_checks() -> tuple[Check, ...]:
    cases = [Check("drawing", case.title, partial(_draws, case=case)) for case in _CASES]
    return (*cases, Check("drawing", "logits that are not finite are told", _not_finite))


def _kernel(subject: Subject) -> DrawTokens:
    kernel = subject.backend.token_drawing()
    claimed(kernel is not None, "a kernel that draws tokens")
    assert kernel is not None
    return kernel


def _draws(subject: Subject, case: DrawingCase) -> None:
    kernel, device = _kernel(subject), subject.backend.torch_device()
    generator = torch.Generator().manual_seed(case.vocab_size)
    num_rows = case.num_rows
    logits = case.spread * torch.randn(num_rows, case.vocab_size, generator=generator)
    temperature = 0.5 + torch.rand(num_rows, generator=generator)
    temperature[3::8] = 0.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(0, 5000, (num_rows,), generator=generator)
    rows = [case.cuts[row % len(case.cuts)] for row in range(num_rows)] if case.cuts else []
    cuts = tuple(torch.tensor(column) for column in zip(*rows, strict=True))
    arguments = (logits, temperature, seeds, positions, *cuts)
    found, is_invalid = kernel(*(argument.to(device) for argument in arguments))
    expect(not is_invalid.any(), "finite logits are called invalid")
    expect(found.dtype == torch.int64, f"token ids are {found.dtype}, must be torch.int64")

    values = _values(logits.double(), temperature.double(), seeds, positions, cuts)
    found = found.cpu()
    expect(bool(((found >= 0) & (found < case.vocab_size)).all()), "a token is not of the vocabulary")
    behind = values.amax(1) - values.gather(1, found.unsqueeze(1)).squeeze(1)
    worst = int(behind.argmax())
    expect(
        bool(behind[worst] <= _NEAR),
        f"row {worst} draws token {int(found[worst])}, which is {behind[worst].item():.3g} behind token "
        f"{int(values[worst].argmax())}",
    )


def _values(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    cuts: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """[num_rows, vocab_size] float64, of which the largest is drawn; -inf for what is cut off."""
    scores = logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    kept = torch.ones(scores.shape, dtype=torch.bool)
    if cuts:
        top_k, top_p, min_p = cuts
        every = torch.where(top_k > 0, top_k, scores.shape[1])
        kept = scores >= min_p_floor(scores, min_p.double().log()) - 1e-6
        candidates = scores.masked_fill(~kept, -torch.inf).sort(1, descending=True).values
        kept &= scores >= top_floor(candidates, every, top_p.double()) - 1e-6
    keys = torch.from_numpy(noise_keys(seeds.numpy().view(np.uint64), positions.numpy()))
    noise = exponential_noise(token_hashes(scores.shape[1], torch.device("cpu")), keys).double().log()
    drawn = (scores - noise).masked_fill(~kept, -torch.inf)
    return torch.where((temperature > 0).unsqueeze(1), drawn, scores)


def _not_finite(subject: Subject) -> None:
    kernel, device = _kernel(subject), subject.backend.torch_device()
    logits = torch.zeros(5, 50_000)
    logits[0, 49_999], logits[1, 0], logits[2, 4500], logits[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    places = torch.arange(5, device=device)
    for temperature in (0.0, 1.0):
        heat = torch.full((5,), temperature, device=device)
        cuts = (torch.full_like(places, 20), torch.full_like(heat, 0.9), torch.full_like(heat, 0.1))
        for some_cuts in ((), cuts):
            token_ids, is_invalid = kernel(logits.to(device), heat, places, places, *some_cuts)
            expect(is_invalid.tolist() == [True, True, True, True, False], f"invalid rows are {is_invalid.tolist()}")
            expect(bool(((token_ids >= 0) & (token_ids < 50_000)).all()), "a token is not of the vocabulary")
