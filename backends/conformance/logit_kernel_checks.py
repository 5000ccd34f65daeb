"""The kernels beside the one that draws, where a backend has them: they do what the sampler's operators do."""

from functools import partial

import torch

from backends.base import LogitKernels
from backends.conformance.check import Check, Subject, claimed, expect
from backends.model_runner.sampler.logprob_report import DrawnLogprobs, num_report_words, write_logprobs
from backends.model_runner.sampler.penalties import penalise_output, penalise_repetition

_NEAR = 2e-5  # between two ways to sum a softmax in float32
_UNTOUCHED = -7


def logit_kernel_checks() -> tuple[Check, ...]:
    return (
        *(
            Check("drawing", f"penalties, {vocab_size} tokens", partial(_penalties, vocab_size=vocab_size))
            for vocab_size in (70, 32_000, 152_064)
        ),
        *(
            Check(
                "drawing",
                f"{num_top} log-probabilities of {vocab_size}",
                partial(_logprobs, vocab_size=vocab_size, num_top=num_top),
            )
            for vocab_size, num_top in ((33, 20), (4097, 1), (50_257, 0), (152_064, 5), (152_064, 20))
        ),
        Check("drawing", "drawn tokens are kept and told", _kept),
    )


def _kernels(subject: Subject) -> LogitKernels:
    kernels = subject.backend.logit_kernels()
    claimed(kernels is not None, "kernels for penalties and log-probabilities")
    assert kernels is not None
    return kernels


def _penalties(subject: Subject, vocab_size: int) -> None:
    """Rows without output, of many blocks of tokens, and of few different tokens that occur again and again."""
    kernels, device = _kernels(subject), subject.backend.torch_device()
    generator = torch.Generator().manual_seed(vocab_size)
    table = torch.randint(0, 60, (9, 5000), generator=generator, dtype=torch.int32)
    rows, table_rows = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([8, 1, 4, 3, 0])
    num_tokens, num_prompt_tokens = torch.tensor([4900, 1, 1024, 30, 1500]), torch.tensor([1100, 1, 1024, 29, 1])
    kinds = ((1.3, 0.5, 0.2), (0.8, 0.0, 0.0), (1.0, -0.4, 0.0), (1.0, 0.0, 0.3), (1.0, 0.0, 0.0))
    for turn in range(len(kinds)):
        penalties = torch.tensor(kinds).roll(turn, 0).T.contiguous()
        logits = 3 * torch.randn(7, vocab_size, generator=generator)
        expected = logits.clone()
        token_ids = table[:, :4900].index_select(0, table_rows).to(torch.int64)
        penalise_repetition(expected, rows, token_ids, num_tokens, penalties[0])
        penalise_output(expected, rows, token_ids, num_tokens, num_prompt_tokens, penalties[1:])
        places = torch.stack((rows, table_rows, num_tokens, num_prompt_tokens))
        found = logits.to(device)
        kernels.penalise(found, places.to(device), penalties.to(device), table.to(device), 4900)
        error = (found.cpu() - expected).abs().max().item()
        expect(error <= 1e-5 * expected.abs().max().item(), f"logits are off by {error:.3g} after turn {turn}")


def _logprobs(subject: Subject, vocab_size: int, num_top: int) -> None:
    kernels, device = _kernels(subject), subject.backend.torch_device()
    generator = torch.Generator().manual_seed(vocab_size + num_top)
    logits = 3 * torch.randn(9, vocab_size, generator=generator)
    logits[2:4] = logits[2:4].to(torch.bfloat16).to(torch.float32)  # has ties
    rows = torch.tensor([0, 2, 3, 5, 8])
    token_ids = torch.randint(0, vocab_size, (9,), generator=generator)
    token_ids[5] = logits[5].argmax()
    words = torch.full((rows.numel(), num_report_words(num_top)), _UNTOUCHED, dtype=torch.int32)
    expected, report = DrawnLogprobs(words.clone()), words.to(device)
    kernels.report_logprobs(logits.to(device), rows.to(device), token_ids.to(device), num_top, report)
    found, raw = DrawnLogprobs(report.cpu()), logits[rows]
    write_logprobs(raw, token_ids[rows], num_top, expected)
    ids = found.token_ids.long()
    expect(bool(((ids >= 0) & (ids < vocab_size)).all()), "a token is not of the vocabulary")
    expect(torch.equal(ids[:, 0], token_ids[rows]), "the first token is not the drawn one")
    above = (raw > raw.gather(1, ids[:, :1])).sum(1) + 1
    expect(
        torch.equal(found.drawn_ranks.long(), above), f"ranks are {found.drawn_ranks.tolist()}, not {above.tolist()}"
    )
    expect(torch.equal(raw.gather(1, ids[:, 1:]), raw.topk(num_top, 1).values), "others than the likeliest are told")
    expect(all(len(set(told)) == num_top for told in ids[:, 1:].tolist()), "a token is told twice")
    error = (found.logprobs - expected.logprobs).abs().max().item()
    expect(error <= _NEAR, f"log-probabilities are off by {error:.3g}")


def _kept(subject: Subject) -> None:
    kernels, device = _kernels(subject), subject.backend.torch_device()
    generator = torch.Generator().manual_seed(0)
    num_rows = 300
    table = torch.zeros(400, 64, dtype=torch.int32)
    cells = torch.randperm(table.numel(), generator=generator)[:num_rows]
    token_ids = torch.randint(1, 152_064, (num_rows,), generator=generator)
    is_invalid = torch.rand(num_rows, generator=generator) < 0.1
    outcome = torch.full((num_rows + 5,), _UNTOUCHED, dtype=torch.int32, device=device)
    found = table.to(device)
    kernels.keep_drawn(token_ids.to(device), is_invalid.to(device), cells.to(device), found, outcome[:num_rows])
    table.view(-1)[cells] = token_ids.to(torch.int32)
    expect(torch.equal(found.cpu(), table), "the token table is not what was drawn")
    told = [*torch.where(is_invalid, -1, token_ids).tolist(), *[_UNTOUCHED] * 5]
    expect(outcome.tolist() == told, "the host is told of other tokens")
