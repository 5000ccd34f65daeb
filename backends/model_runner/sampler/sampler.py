"""Draws each sequence's next token from its logits, on the device, without asking it anything in between."""

from dataclasses import dataclass

import torch

from backends.base import DrawTokens, LogitKernels
from backends.model_runner.sampler.cutoff import min_p_floor, top_floor
from backends.model_runner.sampler.device_draw_plan import DeviceDrawPlan, DevicePenaltyRows, DeviceRandomRows
from backends.model_runner.sampler.draw_plan import DrawPlan, LogprobRows, PenaltyRows, RandomRows
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.model_runner.sampler.logit_edits import apply_edits
from backends.model_runner.sampler.logprob_report import DrawnLogprobs, num_report_words, write_logprobs
from backends.model_runner.sampler.penalties import penalise_output, penalise_repetition

_NUM_CELLS_MAX_CPU = 1 << 18
_NUM_CELLS_MAX = 1 << 25
"""Logits that are worked on at a time: what fits a core's cache, or keeps a device busy in a bounded room."""


_NUM_TOKENS_PENALISED_MAX = 1 << 23
"""Of all sequences' tokens, so many are looked at at a time."""


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """One token for each row of the logits."""

    token_ids: torch.Tensor  # [num_rows] int64
    is_invalid: torch.Tensor  # [num_rows] bool: the logits were not finite, or nothing was left to draw
    logprobs: DrawnLogprobs | None


class Sampler:
    """The drawing of one model on one device. Holds no state of requests.

    With a ``draw_tokens`` kernel it draws every row, so that batch mates make no difference; plans are then
    made ``by_kernel``. What there is no kernel for, torch's operators do.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        draw_tokens: DrawTokens | None = None,
        kernels: LogitKernels | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._draw_tokens = draw_tokens
        self._kernels = kernels
        self._hashes = token_hashes(vocab_size, device)
        num_cells = _NUM_CELLS_MAX_CPU if device.type == "cpu" else _NUM_CELLS_MAX
        self._num_rows_max = max(1, num_cells // vocab_size)

    def report_shape(self, plan: DrawPlan) -> tuple[int, int]:
        """Rows and words of what the plan's `DrawnLogprobs` are written to."""
        if plan.logprobs is None:
            return 0, 0
        return plan.logprobs.rows.size, num_report_words(self._num_top(plan.logprobs))

    def _num_top(self, rows: LogprobRows) -> int:
        return min(rows.num_logprobs_max, self._vocab_size)

    def draw(
        self,
        logits: torch.Tensor,
        plan: DeviceDrawPlan,
        token_table: torch.Tensor,
        drawn: tuple[torch.Tensor, torch.Tensor] | None = None,
        report_words: torch.Tensor | None = None,
    ) -> DrawnTokens:
        """Tokens for logits [num_rows, vocab_size] float32, which are overwritten.

        ``token_table`` [num_table_rows, num_columns] has prompt and output of every request.
        ``drawn`` is what the kernel has made of the very logits: the plan has neither edits nor penalties.
        ``report_words`` [report_shape] int32 is where log-probabilities are written; None: somewhere.
        The order of changes is vLLM's: allowed tokens, bias, tokens held back, bad words, penalties,
        temperature, min_p, top_k, top_p.
        """
        raw = self._raw(logits, plan)
        if drawn is not None:
            token_ids, is_invalid = drawn
        elif self._draw_tokens is None:
            token_ids, is_invalid = self._drawn_by_torch(logits, plan, token_table)
        else:
            token_ids, is_invalid = self._drawn_by_kernel(self._draw_tokens, logits, plan, token_table)
        if plan.refused_rows is not None:
            is_invalid.index_fill_(0, plan.refused_rows, True)
        logprobs = None
        if raw is not None:
            if report_words is None:
                report_words = torch.empty(self.report_shape(plan.host), dtype=torch.int32, device=logits.device)
            logprobs = DrawnLogprobs(report_words)
            self._report(raw, token_ids, plan, logprobs)
        return DrawnTokens(token_ids, is_invalid, logprobs)

    def _raw(self, logits: torch.Tensor, plan: DeviceDrawPlan) -> torch.Tensor | None:
        """Logits that stay as the model gave them: of the rows that are reported, or all where a kernel reports."""
        if plan.logprob_rows is None:
            return None
        if self._kernels is None:
            return logits.index_select(0, plan.logprob_rows)
        return logits if plan.edits is None and plan.penalties is None else logits.clone()

    def _report(
        self, raw: torch.Tensor, token_ids: torch.Tensor, plan: DeviceDrawPlan, logprobs: DrawnLogprobs
    ) -> None:
        assert plan.logprob_rows is not None
        assert plan.host.logprobs is not None
        num_top = self._num_top(plan.host.logprobs)
        if self._kernels is None:
            write_logprobs(raw, token_ids[plan.logprob_rows], num_top, logprobs)
        else:
            self._kernels.report_logprobs(raw, plan.logprob_rows, token_ids, num_top, logprobs.words)

    def _drawn_by_torch(
        self, logits: torch.Tensor, plan: DeviceDrawPlan, token_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_invalid = _not_finite(logits)
        self._edit(logits, plan, token_table)
        best, token_ids = logits.max(1)
        if plan.edits is not None:
            is_invalid |= best == -torch.inf
        if plan.random is not None:
            assert plan.host.random is not None
            token_ids.index_copy_(0, plan.random.rows, self._draw_random(logits, plan.random, plan.host.random))
        return token_ids, is_invalid

    def _drawn_by_kernel(
        self, draw_tokens: DrawTokens, logits: torch.Tensor, plan: DeviceDrawPlan, token_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = plan.kernel
        assert rows is not None
        # Edits make logits infinite on purpose; so these are looked at before.
        was_invalid = None if plan.edits is None else _not_finite(logits)
        self._edit(logits, plan, token_table)
        token_ids, is_invalid = draw_tokens(
            logits, rows.temperature, rows.seeds, rows.positions, rows.top_k, rows.top_p, rows.min_p
        )
        if was_invalid is not None:
            is_invalid = was_invalid.logical_or_(logits.amax(1) == -torch.inf)
        return token_ids, is_invalid

    def _edit(self, logits: torch.Tensor, plan: DeviceDrawPlan, token_table: torch.Tensor) -> None:
        """Change what the plan wants of the logits themselves."""
        if plan.edits is not None:
            apply_edits(logits, plan.edits, token_table)
        if plan.penalties is not None:
            assert plan.host.penalties is not None
            self._penalise(logits, plan.penalties, plan.host.penalties, token_table)

    def _penalise(
        self, logits: torch.Tensor, rows: DevicePenaltyRows, host: PenaltyRows, token_table: torch.Tensor
    ) -> None:
        if self._kernels is not None:
            self._kernels.penalise(logits, rows.places, rows.penalties, token_table, host.num_tokens_max)
            return
        num_rows_max = max(1, _NUM_TOKENS_PENALISED_MAX // host.num_tokens_max)
        for start in range(0, rows.places.shape[1], num_rows_max):
            part = slice(start, start + num_rows_max)
            logit_rows, table_rows, num_tokens, num_prompt_tokens = rows.places[:, part]
            token_ids = token_table[:, : host.num_tokens_max].index_select(0, table_rows).to(torch.int64)
            repetition, others = rows.penalties[0, part], rows.penalties[1:, part]
            if host.has_repetition:
                penalise_repetition(logits, logit_rows, token_ids, num_tokens, repetition)
            if host.has_others:
                penalise_output(logits, logit_rows, token_ids, num_tokens, num_prompt_tokens, others)

    def _draw_random(self, logits: torch.Tensor, rows: DeviceRandomRows, host: RandomRows) -> torch.Tensor:
        """[num_random] int64, part by part; no part has rows of two kinds of cut-off."""
        drawn = []
        few_start = host.num_uncut
        sort_start = few_start + host.num_few
        for start, end, num_candidates in (
            (0, few_start, 0),
            (few_start, sort_start, host.few_top_k_max),
            (sort_start, host.rows.size, logits.shape[1]),
        ):
            for part_start in range(start, end, self._num_rows_max):
                part = slice(part_start, min(end, part_start + self._num_rows_max))
                drawn.append(self._draw_part(logits, rows, part, num_candidates))
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _draw_part(
        self, logits: torch.Tensor, rows: DeviceRandomRows, part: slice, num_candidates: int
    ) -> torch.Tensor:
        scores = logits.index_select(0, rows.rows[part]).div_(rows.temperature[part].unsqueeze(1))
        if rows.log_min_p is not None:
            scores.masked_fill_(scores < min_p_floor(scores, rows.log_min_p[part]), -torch.inf)
        if num_candidates:
            if num_candidates < scores.shape[1]:
                candidates = scores.topk(num_candidates, 1).values
            else:
                candidates = scores.sort(1, descending=True).values
            floor = top_floor(candidates, rows.top_k[part], rows.top_p[part])
            scores.masked_fill_(scores < floor, -torch.inf)
        noise = exponential_noise(self._hashes, rows.keys[:, part])
        return scores.sub_(noise.log_()).argmax(1)


def _not_finite(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows] bool: whether a row has infinite logits, or some that are no numbers."""
    return logits.sum(1).isfinite().logical_not_()
