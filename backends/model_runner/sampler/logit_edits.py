"""Changes of single logits: bias, allowed tokens, tokens held back, bad words."""

import torch

from backends.model_runner.sampler.device_draw_plan import DeviceEditRows


def apply_edits(logits: torch.Tensor, edits: DeviceEditRows, token_table: torch.Tensor) -> None:
    """Edit logits [num_rows, vocab_size] in place, by a plan's ``EditRows``.

    ``token_table`` is [num_table_rows, num_columns]: the tokens of all requests.
    """
    cells = logits.view(-1)
    if edits.limited_rows.numel():
        limit(logits, edits.limited_rows, edits.allowed_cells)
    if edits.bias_cells.numel():
        cells.index_add_(0, edits.bias_cells, edits.bias_values)
    if edits.banned_cells.numel():
        cells.index_fill_(0, edits.banned_cells, -torch.inf)
    if edits.word_cells.numel():
        ends = ends_with_prefix(token_table, edits.word_table_rows, edits.word_num_tokens, edits.word_prefixes)
        cells.index_add_(0, edits.word_cells, torch.where(ends, -torch.inf, 0.0))


def limit(logits: torch.Tensor, rows: torch.Tensor, allowed_cells: torch.Tensor) -> None:
    """Leave nothing but the allowed cells in these rows; cells count within the rows [len(rows), vocab_size]."""
    is_barred = torch.ones(rows.numel(), logits.shape[1], dtype=torch.bool, device=logits.device)
    is_barred.view(-1).index_fill_(0, allowed_cells, False)
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_barred, -torch.inf))


def ends_with_prefix(
    token_table: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, prefixes: torch.Tensor
) -> torch.Tensor:
    """[num_words] bool: whether a word's row of tokens, of this length, ends with the word's prefix.

    ``prefixes`` [num_words, prefix_len_max] have the last token first, and -1 beyond a prefix.
    """
    steps_back = torch.arange(prefixes.shape[1], device=prefixes.device)
    positions = (num_tokens.unsqueeze(1) - 1 - steps_back).clamp(min=0)
    tokens = token_table[rows.unsqueeze(1), positions]
    return ((tokens == prefixes) | (prefixes < 0)).all(1)
