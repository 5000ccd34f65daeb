"""What is drawn follows the distribution that transformers makes of the same wishes, and depends on nothing else."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from drawing import DEVICE, Wisher, draw, draw_positions, draw_seeds, transformers_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.model_runner.sampler import draw_plan
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.model_runner.sampler.noise_keys import noise_keys
from sagellm.core.sampling import GREEDY, SamplingParameters

VOCAB_SIZE = 40
NUM_DRAWS = 4000
CPU = torch.device("cpu")
P_VALUE_MIN = 1e-3  # draws are the same in every run, so this fails always or never


def random_logits(num_rows: int = 1, vocab_size: int = VOCAB_SIZE, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def assert_follows(tokens: torch.Tensor, scores: torch.Tensor) -> None:
    """Draws are of the softmax of scores: chi-square, tokens that are too rare for it taken together."""
    probabilities = scores.double().softmax(0)
    counts = torch.bincount(tokens, minlength=scores.numel()).double()
    assert not counts[probabilities == 0].any()
    expected = probabilities * tokens.numel()
    is_common = expected >= 5
    observed = [*counts[is_common].tolist(), counts[~is_common].sum().item()]
    wanted = [*expected[is_common].tolist(), expected[~is_common].sum().item()]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    if len(wanted) > 1:
        assert scipy.stats.chisquare(observed, wanted).pvalue > P_VALUE_MIN


WISHES = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": VOCAB_SIZE + 5},
    "top_p": {"top_p": 0.8},
    "top_p that leaves one": {"top_p": 0.01},
    "min_p": {"min_p": 0.1},
    "all cut-offs": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "all penalties": {"repetition_penalty": 0.7, "presence_penalty": 0.4, "frequency_penalty": 0.5, "top_p": 0.9},
    "bias": {"logit_bias": ((3, 4.0), (7, -100.0), (0, 1.5))},
    "allowed": {"allowed_token_ids": (2, 3, 5, 7, 11, 13)},
    "stops held back": {"min_tokens": 9},
    "stops let through": {"min_tokens": 8},
    "bad tokens": {"bad_words": ((4,), (9,))},
    "bad words": {"bad_words": ((1, 2), (5, 5, 6), (2, 8), (30, 5, 5, 3), (8, 5, 5, 7), (6, 5, 4))},
    "all edits": {
        "logit_bias": ((3, 4.0), (20, -2.0)),
        "allowed_token_ids": tuple(range(0, VOCAB_SIZE, 2)),
        "bad_words": ((4,), (5, 8), (5, 5, 10)),
        "min_tokens": 20,
        "repetition_penalty": 1.2,
        "top_k": 9,
    },
}
OUTPUT = (30, 6, 5, 30, 30, 8, 5, 5)
STOPS = (1, 6, 14)


@pytest.mark.parametrize("name", WISHES)
def test_draws_follow_transformers(name: str) -> None:
    wisher = Wisher(SamplingParameters(**WISHES[name]), (3, 9, 3, 0, 17), OUTPUT, STOPS)  # type: ignore[arg-type]
    logits = random_logits(seed=len(name))[0]
    scores = transformers_scores(logits, wisher)
    assert_follows(draw_seeds(logits, wisher, NUM_DRAWS), scores)


@pytest.mark.parametrize("name", WISHES)
def test_the_most_likely_token_is_that_of_transformers(name: str) -> None:
    wishes = {**WISHES[name], "temperature": 0.0}
    wisher = Wisher(SamplingParameters(**wishes), (3, 9, 3, 0, 17), OUTPUT, STOPS)  # type: ignore[arg-type]
    logits = random_logits(300)
    expected = torch.stack([transformers_scores(row, wisher) for row in logits]).argmax(1)
    assert torch.equal(draw(logits, [wisher] * 300).token_ids, expected)


def test_a_wide_top_k_is_sorted_and_a_small_one_selected_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    wishers = [Wisher(SamplingParameters(top_k=k, top_p=0.95, seed=k)) for k in range(1, VOCAB_SIZE)]
    logits = random_logits(len(wishers))
    selected = draw(logits, wishers).token_ids
    monkeypatch.setattr(draw_plan, "FEW_CANDIDATES_MAX", 0)
    assert torch.equal(draw(logits, wishers).token_ids, selected)


@pytest.mark.parametrize("vocab_size", [4, 26])
def test_positions_of_one_seed_are_independent(vocab_size: int) -> None:
    num_positions = 50_000
    logits = random_logits(vocab_size=vocab_size, scale=0.7)[0]
    tokens = draw_positions(logits, SamplingParameters(seed=2**63 + 11), num_positions)
    assert_follows(tokens, logits)
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    if vocab_size < 10:
        assert_follows(pairs, (logits.unsqueeze(1) + logits).view(-1))
    else:
        correlation = torch.corrcoef(torch.stack((tokens[:-1], tokens[1:])).double())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(num_positions)


def test_draws_are_as_those_of_torch() -> None:
    logits = random_logits(vocab_size=8)[0]
    own = torch.bincount(draw_seeds(logits, Wisher(SamplingParameters()), NUM_DRAWS), minlength=8)
    generator = torch.Generator().manual_seed(0)
    torchs = torch.bincount(torch.multinomial(logits.softmax(0), NUM_DRAWS, True, generator=generator), minlength=8)
    assert scipy.stats.chi2_contingency(torch.stack((own, torchs)).numpy()).pvalue > P_VALUE_MIN


def test_a_large_vocabulary_is_drawn_from_evenly() -> None:
    vocab_size, num_draws = 151_936, 400
    logits = torch.zeros(1, vocab_size)
    tokens = draw_seeds(logits[0], Wisher(SamplingParameters()), num_draws)
    assert scipy.stats.kstest((tokens / vocab_size).numpy(), "uniform").pvalue > P_VALUE_MIN
    assert scipy.stats.kstest((tokens % 16 / 16).numpy() + 1 / 32, "uniform").statistic < 0.1
    assert tokens.unique().numel() > num_draws - 5


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_noise_is_exponential_and_independent_over_tokens_and_draws(axis: str) -> None:
    num_draws, num_tokens, num_bins = 1500, 500, 6
    numbers, zeros = np.arange(num_draws), np.zeros(num_draws, np.int64)
    seeds, positions = (numbers, zeros) if axis == "seeds" else (zeros, numbers)
    noise = exponential_noise(
        token_hashes(num_tokens, CPU), torch.from_numpy(noise_keys(seeds.astype(np.uint64), positions))
    )
    assert scipy.stats.kstest(noise.view(-1)[::7].numpy(), "expon").pvalue > P_VALUE_MIN
    bins = ((1 - (-noise.double()).exp()) * num_bins).long().clamp(max=num_bins - 1)
    for draws, tokens in ((0, 1), (0, 2), (0, 16), (1, 0), (2, 0), (1, 1)):
        ours, others = bins[: num_draws - draws, : num_tokens - tokens], bins[draws:, tokens:]
        pairs = torch.bincount((ours * num_bins + others).reshape(-1), minlength=num_bins**2)
        assert scipy.stats.chisquare(pairs.numpy()).pvalue > P_VALUE_MIN


def test_keys_that_lie_a_token_apart_do_not_shift_the_noise() -> None:
    hashes = token_hashes(200, CPU)
    keys = torch.stack((hashes[:2], torch.tensor([5, 6], dtype=torch.int32)))
    noise = exponential_noise(hashes, keys)
    assert (noise[0, 1:] == noise[1, :-1]).sum() < 3


def test_each_bit_of_seed_position_and_token_changes_half_of_the_noise() -> None:
    seeds = np.arange(64, dtype=np.uint64) * np.uint64(977)
    zeros = np.zeros(64, np.int64)
    before = noise_bits(noise_keys(seeds, zeros))
    for bit in (0, 1, 17, 31, 32, 63):
        assert abs((noise_bits(noise_keys(seeds ^ np.uint64(1 << bit), zeros)) != before).float().mean() - 0.5) < 0.02
    for position in (1, 2, 1 << 20):
        assert abs((noise_bits(noise_keys(seeds, zeros + position)) != before).float().mean() - 0.5) < 0.02
    assert abs((before[:, 1:] != before[:, :-1]).float().mean() - 0.5) < 0.02


def noise_bits(keys: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    """Whether each token's noise is above its median: [num_keys, 200] bool."""
    return exponential_noise(token_hashes(200, CPU), torch.from_numpy(keys)) > math.log(2)


token_ids = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def wishers(draw_from: st.DrawFn) -> Wisher:
    def maybe(strategy: st.SearchStrategy[float], none: float) -> float:
        return draw_from(st.one_of(st.just(none), strategy))

    words = st.lists(st.lists(token_ids, min_size=1, max_size=3).map(tuple), max_size=3)
    sampling = SamplingParameters(
        temperature=maybe(st.floats(0.2, 2), 0.0),
        top_k=int(maybe(st.integers(1, VOCAB_SIZE), 0)),
        top_p=maybe(st.floats(0.1, 1), 1.0),
        min_p=maybe(st.floats(0, 0.5), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2), 1.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        seed=draw_from(st.integers(0, 2**64 - 1)),
        min_tokens=draw_from(st.integers(0, 6)),
        logit_bias=tuple(draw_from(st.lists(st.tuples(token_ids, st.floats(-9, 9)), max_size=3))),
        allowed_token_ids=tuple(draw_from(st.one_of(st.just([]), st.lists(token_ids, min_size=1)))),
        bad_words=tuple(draw_from(words)),
        num_logprobs=draw_from(st.one_of(st.none(), st.integers(0, 5))),
    )
    prompt = tuple(draw_from(st.lists(token_ids, min_size=1, max_size=6)))
    output = tuple(draw_from(st.lists(token_ids, max_size=8)))
    return Wisher(sampling, prompt, output, tuple(draw_from(st.lists(token_ids, max_size=2))))


@settings(deadline=None, max_examples=40)
@given(st.lists(wishers(), min_size=1, max_size=8), st.integers(0, 1000))
def test_batch_mates_make_no_difference(batch: list[Wisher], seed: int) -> None:
    logits = random_logits(len(batch), seed=seed)
    together = draw(logits, batch)
    reported = 0
    for row, wisher in enumerate(batch):
        alone = draw(logits[row : row + 1], [wisher])
        assert alone.token_ids[0] == together.token_ids[row]
        assert alone.is_invalid[0] == together.is_invalid[row]
        if alone.logprobs is not None:
            assert together.logprobs is not None
            num_shown = (wisher.sampling.num_logprobs or 0) + 1
            for field in ("token_ids", "logprobs"):
                ours, theirs = getattr(alone.logprobs, field)[0], getattr(together.logprobs, field)[reported]
                assert torch.equal(ours[:num_shown], theirs[:num_shown])
            reported += 1


@settings(deadline=None, max_examples=40)
@given(wishers(), st.integers(0, 1000))
def test_what_is_drawn_is_left_by_transformers(wisher: Wisher, seed: int) -> None:
    if any(len(word) > 1 for word in wisher.sampling.bad_words) or len(
        {t for t, _ in wisher.sampling.logit_bias}
    ) < len(wisher.sampling.logit_bias):
        return  # transformers looks for bad words in the prompt, too, and has one bias for a token
    logits = random_logits(seed=seed)
    drawn = draw(logits, [wisher])
    scores = transformers_scores(logits[0], wisher)
    if scores.max() == -torch.inf:
        assert drawn.is_invalid[0]
    else:
        assert not drawn.is_invalid[0]
        assert scores[drawn.token_ids[0]] > -torch.inf


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no accelerator to compare the CPU with")
@pytest.mark.parametrize("name", WISHES)
def test_the_device_makes_no_difference(name: str) -> None:
    batch = [Wisher(SamplingParameters(**WISHES[name], seed=seed), (3, 9), OUTPUT, STOPS) for seed in range(500)]  # type: ignore[arg-type]
    logits = random_logits(500)
    assert torch.equal(draw(logits, batch).token_ids, draw(logits, batch, CPU).token_ids)


def test_bad_words_look_at_the_output_alone() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 8] = 5
    sampling = SamplingParameters(temperature=0.0, bad_words=((7, 8),))
    assert draw(logits, [Wisher(sampling, prompt=(7,))]).token_ids[0] == 8
    assert draw(logits, [Wisher(sampling, prompt=(1,), output=(7,))]).token_ids[0] != 8
    assert draw(logits, [Wisher(sampling, prompt=(1,), output=(7, 3))]).token_ids[0] == 8


def test_token_ids_that_the_model_does_not_have_change_nothing() -> None:
    logits = random_logits(2)
    strange = SamplingParameters(
        temperature=0.0, logit_bias=((VOCAB_SIZE, 50.0), (-1, 50.0)), bad_words=((VOCAB_SIZE + 3,), ()), min_tokens=3
    )
    wisher = Wisher(strange, stop_token_ids=(VOCAB_SIZE + 1,))
    assert torch.equal(draw(logits, [wisher, wisher]).token_ids, logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_allows_nothing_is_told_apart(temperature: float) -> None:
    nothing = SamplingParameters(temperature=temperature, allowed_token_ids=(3, 4), bad_words=((3,), (4,)))
    one = SamplingParameters(temperature=temperature, allowed_token_ids=(3, 4), bad_words=((4,),))
    drawn = draw(random_logits(2), [Wisher(nothing), Wisher(one)])
    assert drawn.is_invalid.tolist() == [True, False]
    assert drawn.token_ids[1] == 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(3)
    sampling = SamplingParameters(temperature=0.5, num_logprobs=4, logit_bias=((5, 30.0),))
    drawn = draw(logits, [Wisher(GREEDY), Wisher(sampling), Wisher(SamplingParameters(num_logprobs=2))])
    expected = logits.log_softmax(1)
    assert drawn.logprobs is not None
    assert drawn.logprobs.token_ids.shape == (2, 5)
    assert drawn.token_ids[1] == 5  # the bias decides, and is not seen in what is reported
    for index, row in enumerate((1, 2)):
        ids = drawn.logprobs.token_ids[index].long()
        assert ids[0] == drawn.token_ids[row]
        assert torch.equal(ids[1:], expected[row].topk(4).indices)
        assert torch.allclose(drawn.logprobs.logprobs[index], expected[row][ids])
        assert drawn.logprobs.drawn_ranks[index] == (expected[row] >= expected[row][ids[0]]).sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_told_apart(value: float) -> None:
    logits = random_logits(5)
    spoilt = logits.clone()
    spoilt[2, 7] = value
    batch = [Wisher(SamplingParameters(seed=row, top_p=0.9, repetition_penalty=1.1)) for row in range(5)]
    drawn, expected = draw(spoilt, batch), draw(logits, batch)
    assert drawn.is_invalid.tolist() == [False, False, True, False, False]
    assert torch.equal(drawn.token_ids[drawn.is_invalid.logical_not()], expected.token_ids[[0, 1, 3, 4]])
    assert 0 <= drawn.token_ids[2] < VOCAB_SIZE
