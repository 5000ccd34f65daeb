"""What is told of log-probabilities: for each row that asked, words that the host gets in one copy."""

from dataclasses import dataclass

import torch

_NUM_WORDS_FIRST = 3  # the drawn token's rank, its id and its log-probability
_NUM_WORDS_EACH = 2


def num_report_words(num_top: int) -> int:
    """Of a row with so many of the most likely tokens."""
    return _NUM_WORDS_FIRST + _NUM_WORDS_EACH * num_top


@dataclass(frozen=True, slots=True)
class DrawnLogprobs:
    """Raw log-probabilities of the rows that asked; the drawn token first, then the most likely ones."""

    words: torch.Tensor  # [num_reported, num_report_words] int32

    @property
    def drawn_ranks(self) -> torch.Tensor:
        """[num_reported] int32, from 1."""
        return self.words[:, 0]

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_reported, 1 + num_top] int32."""
        return self.words[:, 1::_NUM_WORDS_EACH]

    @property
    def logprobs(self) -> torch.Tensor:
        """[num_reported, 1 + num_top] float32."""
        return self.words[:, 2::_NUM_WORDS_EACH].view(torch.float32)


def write_logprobs(raw: torch.Tensor, token_ids: torch.Tensor, num_top: int, report: DrawnLogprobs) -> None:
    """Of logits [num_reported, vocab_size] as the model gave them, and tokens [num_reported] drawn for them."""
    logprobs = raw.log_softmax(1)
    drawn = logprobs.gather(1, token_ids.unsqueeze(1))
    top = logprobs.topk(num_top, 1)
    report.drawn_ranks.copy_((logprobs > drawn).sum(1).add_(1))
    report.token_ids.copy_(torch.cat((token_ids.unsqueeze(1), top.indices), 1))
    report.logprobs.copy_(torch.cat((drawn, top.values), 1))
