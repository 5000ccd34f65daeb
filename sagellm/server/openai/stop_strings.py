"""Stop strings, found as the text grows, and never shown in part."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found; what was pushed after it is dropped."""

    stop: str


class StopStrings:
    """One answer's search. Text that may be the beginning of a stop string is held back until that is known."""

    __slots__ = ("_held", "_length_max", "_stops", "_with_stop")

    def __init__(self, stops: tuple[str, ...], with_stop: bool) -> None:
        self._stops = stops
        self._with_stop = with_stop  # the stop string itself is given out, too
        self._length_max = max(map(len, stops))
        self._held = ""

    def push(self, text: str) -> tuple[str, StopMatch | None]:
        """Text that may go out, and the stop string that comes first in it, if one is there now."""
        text = self._held + text
        found = [(start, -len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return text[: start + len(stop)] if self._with_stop else text[:start], StopMatch(stop)
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, once the answer is over."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._length_max - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
