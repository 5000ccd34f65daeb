"""Steps of an executor or a served instance, each with what it asked for and how long it took."""

from dataclasses import dataclass

from msgspec.structs import replace

from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.cost_model.step_cost import StepFeatures


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One forward pass in a pipeline of steps.

    ``device_us`` runs from its launch, or from the end of the step before it where that is later, to its
    end: the period of steps that follow each other. In a server it always runs from the end of the step
    before it where that one had not been heard of before: what the driver is late is part of the period.
    ``core_us`` is what the machine took to handle the news of a step and to decide on the next; 0 where
    that is not known.
    """

    features: StepFeatures
    device_us: float
    core_us: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.features.num_decode_seqs + sum(num_tokens for num_tokens, _ in self.features.chunks)

    @property
    def num_seqs(self) -> int:
        return self.features.num_decode_seqs + len(self.features.chunks)

    @property
    def num_token_pairs(self) -> float:
        """Pairs of a chunk's query token and a key that it attends to."""
        return sum(num_tokens * (num_computed + num_tokens / 2) for num_tokens, num_computed in self.features.chunks)


def features_of(plan: StepPlan) -> StepFeatures:
    chunks = tuple((chunk.num_tokens, chunk.num_computed_tokens) for chunk in plan.chunks)
    return StepFeatures(len(plan.decode_request_ids), plan.num_decode_context_tokens, chunks)


@dataclass(frozen=True, slots=True)
class _Launched:
    features: StepFeatures
    launched_ns: int
    follows: bool


class StepTimer:
    """Pairs launches of one instance with their ends, both in their order."""

    def __init__(self) -> None:
        self.steps: list[TimedStep] = []
        self._launched: dict[int, _Launched] = {}
        self._previous_end_ns = 0
        self._prefilling_ns = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._launched)

    def launched(self, step: RunStep, now_ns: int, *, follows: bool = False) -> None:
        """``follows``: its period begins with the end of the step before it, however long that was ago."""
        self._launched[step.step_id] = _Launched(features_of(step.plan), now_ns, follows)

    def finished(self, event: StepFinished, core_us: float = 0.0) -> TimedStep:
        """Only for steps that ran once: repetitions have no ends of their own to tell apart here."""
        launched = self._launched.pop(event.step_id)
        (end_ns,) = event.ends_ns
        start_ns = self._previous_end_ns if launched.follows else max(launched.launched_ns, self._previous_end_ns)
        if start_ns > self._previous_end_ns:
            self._prefilling_ns = 0
        features = replace(launched.features, prefilling_ns=self._prefilling_ns)
        self._prefilling_ns = self._prefilling_ns + end_ns - start_ns if features.chunks else 0
        self._previous_end_ns = end_ns
        step = TimedStep(features, (end_ns - start_ns) / 1e3, core_us)
        self.steps.append(step)
        return step
