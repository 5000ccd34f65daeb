"""Plans the drawing of step after step, and looks up once what stays while the same requests decode."""

from dataclasses import replace

import numpy as np

from backends.model_runner.packed_arrays import Array
from backends.model_runner.sampler.draw_plan import DrawPlan, plan_drawing
from backends.model_runner.sampler.parameter_table import ParameterTable


class DrawPlanner:
    """See `plan_drawing`."""

    def __init__(self, table: ParameterTable, vocab_size: int, *, by_kernel: bool) -> None:
        self._table = table
        self._vocab_size = vocab_size
        self._by_kernel = by_kernel
        self._rows: Array | None = None
        self._num_changes = 0
        self._plan = DrawPlan(0)
        self._num_prompt_tokens = np.zeros(0, np.int64)

    def plan(self, table_rows: Array, num_tokens: Array) -> DrawPlan:
        """For the logits of these requests, of which so many tokens are known: both [num_sampled] int64.

        ``table_rows`` that are the very array of the step before have its requests, and are not changed.
        """
        last = self._plan
        if table_rows is self._rows and self._table.num_changes == self._num_changes and last.kernel is not None:
            kernel = last.kernel.at(num_tokens - self._num_prompt_tokens)
            penalties = None if last.penalties is None else last.penalties.at(num_tokens)
            return replace(last, kernel=kernel, penalties=penalties)
        plan = plan_drawing(self._table, table_rows, num_tokens, self._vocab_size, by_kernel=self._by_kernel)
        # Which logits are edited may change with every token.
        is_kept = plan.kernel is not None and plan.edits is None
        self._rows = table_rows if is_kept else None
        if is_kept:
            self._num_changes = self._table.num_changes
            self._plan = plan
            self._num_prompt_tokens = self._table.num_prompt_tokens[table_rows]
        return plan
