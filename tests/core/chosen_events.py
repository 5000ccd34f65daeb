"""Rules of a state machine that are chosen by weight.

Hypothesis leaves out many rules of a machine in any one run, which suits machines whose rules stand by
themselves. Here most rules need what others have set up, so one rule of Hypothesis chooses among ours.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, rule

Method = Callable[..., None]


def happens(
    weight: int = 2, *, when: Callable[[Any], object] | None = None, **arguments: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Mark a method as an event: how likely it is, when it can be, and its arguments."""

    def mark(method: Method) -> Method:
        method.chosen_event = (weight, when, arguments)  # type: ignore[attr-defined]
        return method

    return mark


class ChosenEvents(RuleBasedStateMachine):
    """A state machine of methods that `happens` marks."""

    @rule(data=st.data())
    def next_event(self, data: st.DataObject) -> None:
        possible = [
            method
            for method in vars(type(self)).values()
            for weight, when, _ in [getattr(method, "chosen_event", (0, None, {}))]
            if weight and (when is None or when(self))
            for _ in range(weight)
        ]
        method = possible[data.draw(st.integers(0, len(possible) - 1))]
        arguments = {
            name: data if isinstance(strategy, type(st.data())) else data.draw(strategy)
            for name, strategy in method.chosen_event[2].items()
        }
        note(f"{method.__name__}({', '.join(f'{k}={v}' for k, v in arguments.items() if k != 'data')})")
        method(self, **arguments)
