"""Draws from given logits as the executor does, and what transformers makes of the same wishes."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers

from backends.model_runner.packed_arrays import ArrayPacker, StagingBuffer
from backends.model_runner.sampler.device_draw_plan import PackedDrawPlan
from backends.model_runner.sampler.draw_plan import plan_drawing
from backends.model_runner.sampler.logprob_report import DrawnLogprobs
from backends.model_runner.sampler.parameter_table import ParameterTable
from backends.model_runner.sampler.sampler import DrawnTokens, Sampler
from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import SamplingParameters

# Where the machine has an accelerator, it is that one's drawing that is tested.
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Wisher:
    """One request as it stands when a token is drawn for it."""

    sampling: SamplingParameters
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.output

    def spec(self) -> RequestSpec:
        return RequestSpec(
            RequestId("r"), 0, len(self.prompt), 1000, sampling=self.sampling, stop_token_ids=self.stop_token_ids
        )


def draw_positions(logits: torch.Tensor, sampling: SamplingParameters, num_positions: int) -> torch.Tensor:
    """Tokens [num_positions] int64 for logits [vocab_size], one for each position of one long output."""
    rows, vocab_size = np.zeros(num_positions, np.int64), logits.numel()
    table = ParameterTable(vocab_size, 1)
    wisher = Wisher(sampling)
    table.fill(0, wisher.spec())
    plan = plan_drawing(table, rows, np.arange(num_positions) + len(wisher.prompt), vocab_size)
    packer = ArrayPacker(StagingBuffer(is_pinned=False))
    packed = PackedDrawPlan(plan, packer)
    no_tokens = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    every_row = logits.to(DEVICE).repeat(num_positions, 1)
    return Sampler(vocab_size, DEVICE).draw(every_row, packed.on(packer.copy_to(DEVICE)), no_tokens).token_ids.cpu()


def draw(logits: torch.Tensor, wishers: list[Wisher], device: torch.device = DEVICE) -> DrawnTokens:
    """A token for each row of logits [len(wishers), vocab_size], drawn on the device; all on the CPU again."""
    vocab_size = logits.shape[1]
    table = ParameterTable(vocab_size, len(wishers))
    token_table = torch.full((len(wishers), max(len(wisher.tokens) for wisher in wishers) + 2), -1, dtype=torch.int32)
    for row, wisher in enumerate(wishers):
        table.fill(row, wisher.spec())
        token_table[row, : len(wisher.tokens)] = torch.tensor(wisher.tokens, dtype=torch.int32)
    num_tokens = np.array([len(wisher.tokens) for wisher in wishers], np.int64)
    plan = plan_drawing(table, np.arange(len(wishers)), num_tokens, vocab_size)
    packer = ArrayPacker(StagingBuffer(is_pinned=False))
    packed = PackedDrawPlan(plan, packer)
    drawn = Sampler(vocab_size, device).draw(
        logits.to(device, copy=True), packed.on(packer.copy_to(device)), token_table.to(device)
    )
    logprobs = drawn.logprobs
    if logprobs is not None:
        logprobs = DrawnLogprobs(logprobs.words.cpu())
    return DrawnTokens(drawn.token_ids.cpu(), drawn.is_invalid.cpu(), logprobs)


def draw_seeds(logits: torch.Tensor, wisher: Wisher, num_seeds: int) -> torch.Tensor:
    """Tokens [num_seeds] int64 for logits [vocab_size], each with a seed of its own."""
    wishers = [
        Wisher(_with_seed(wisher.sampling, seed), wisher.prompt, wisher.output, wisher.stop_token_ids)
        for seed in range(num_seeds)
    ]
    return draw(logits.expand(num_seeds, -1), wishers).token_ids


def _with_seed(sampling: SamplingParameters, seed: int) -> SamplingParameters:
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    return SamplingParameters(**{**fields, "seed": seed})


def transformers_scores(logits: torch.Tensor, wisher: Wisher) -> torch.Tensor:
    """What transformers' processors, in vLLM's order, make of logits [vocab_size]; before drawing."""
    sampling, vocab_size = wisher.sampling, logits.numel()
    input_ids = torch.tensor([wisher.tokens])
    chain: list[object] = []
    if sampling.allowed_token_ids:
        barred = sorted(set(range(vocab_size)) - set(sampling.allowed_token_ids))
        chain.append(transformers.SuppressTokensLogitsProcessor(barred))
    if sampling.logit_bias:
        bias = {(token_id,): value for token_id, value in sampling.logit_bias}
        chain.append(transformers.SequenceBiasLogitsProcessor(bias))
    if sampling.min_tokens and wisher.stop_token_ids:
        chain.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                len(wisher.prompt), sampling.min_tokens, list(wisher.stop_token_ids)
            )
        )
    if sampling.bad_words:
        chain.append(transformers.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.repetition_penalty != 1:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    scores = transformers.LogitsProcessorList(chain)(input_ids, logits.unsqueeze(0).clone())
    # transformers has neither of these two; OpenAI's API reference gives the formula.
    counts = torch.bincount(torch.tensor(wisher.output, dtype=torch.int64), minlength=vocab_size)
    scores = scores - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    if sampling.temperature == 0:
        return scores[0]
    warpers: list[object] = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.min_p:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    return transformers.LogitsProcessorList(warpers)(input_ids, scores)[0]
