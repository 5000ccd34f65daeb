"""The last minutes second by second: what the live page's charts show."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

SECOND_NS = 1_000_000_000
SECONDS_KEPT = 300
_SAMPLES_MAX = 512  # of one second; more would change its median by little


class Gauges(msgspec.Struct, frozen=True):
    """What is true at a moment, not summed over a second."""

    num_running: int = 0
    num_queued: int = 0  # with the control plane and with instances
    kv_usage: float = 0.0  # 0 to 1, over all instances


class SecondFigures(msgspec.Struct, frozen=True):
    """One second of a server's life. Times are medians and 90th percentiles; None where nothing happened."""

    second: int  # of the engine's clock
    output_tokens: int
    prompt_tokens: int
    finished: int
    rejected: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    gauges: Gauges


@dataclass(slots=True)
class _Second:
    second: int
    output_tokens: int = 0
    prompt_tokens: int = 0
    finished: int = 0
    rejected: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


class LiveSeries:
    """Takes what happens, closes each second when the next begins, and keeps the latest ones."""

    def __init__(self) -> None:
        self._open = _Second(-1)
        self._closed: deque[SecondFigures] = deque(maxlen=SECONDS_KEPT)
        self.gauges: Callable[[], Gauges] = Gauges  # asked when a second closes

    def emitted(self, now_ns: int, num_tokens: int) -> None:
        """So many output tokens went out."""
        self._at(now_ns).output_tokens += num_tokens

    def first_token(self, now_ns: int, ttft_s: float, num_prompt_tokens: int) -> None:
        """A request got its first token."""
        second = self._at(now_ns)
        second.prompt_tokens += num_prompt_tokens
        if len(second.ttft_s) < _SAMPLES_MAX:
            second.ttft_s.append(ttft_s)

    def finished(self, now_ns: int, tpot_s: float | None) -> None:
        """A request ended as it should."""
        second = self._at(now_ns)
        second.finished += 1
        if tpot_s is not None and len(second.tpot_s) < _SAMPLES_MAX:
            second.tpot_s.append(tpot_s)

    def rejected(self, now_ns: int) -> None:
        """A request was refused."""
        self._at(now_ns).rejected += 1

    def since(self, now_ns: int, second: int) -> list[SecondFigures]:
        """Closed seconds after that one."""
        self._at(now_ns)
        return [each for each in self._closed if each.second > second]

    def _at(self, now_ns: int) -> _Second:
        """The open second, after closing those before it. Seconds without events are closed empty."""
        second = now_ns // SECOND_NS
        if second > self._open.second:
            if self._open.second >= 0:
                gauges = self.gauges()
                self._closed.append(_closed(self._open, gauges))
                first_idle = max(self._open.second + 1, second - SECONDS_KEPT)
                self._closed.extend(_closed(_Second(idle), gauges) for idle in range(first_idle, second))
            self._open = _Second(second)
        return self._open


def _closed(second: _Second, gauges: Gauges) -> SecondFigures:
    return SecondFigures(
        second=second.second,
        output_tokens=second.output_tokens,
        prompt_tokens=second.prompt_tokens,
        finished=second.finished,
        rejected=second.rejected,
        ttft_p50_s=_percentile(second.ttft_s, 0.5),
        ttft_p90_s=_percentile(second.ttft_s, 0.9),
        tpot_p50_s=_percentile(second.tpot_s, 0.5),
        tpot_p90_s=_percentile(second.tpot_s, 0.9),
        gauges=gauges,
    )


def _percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that so many are not above."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
