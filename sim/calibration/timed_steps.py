"""Steps of an executor or a served instance, each with what it asked for and how long it took."""

from collections.abc import Iterable
from dataclasses import dataclass

from sagellm.core.identity import InstanceId
from sagellm.core.log import HandledEvent, Polled
from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.cost_model.step_cost import StepFeatures


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One forward pass in a pipeline of steps.

    ``device_us`` runs from its launch, or from the end of the step before it where that is later, to its
    end: the period of steps that follow each other. ``core_us`` is what the machine took to handle the
    news of a step and to decide on the next; 0 where that is not known.
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


class StepTimer:
    """Pairs launches of one instance with their ends."""

    def __init__(self) -> None:
        self.steps: list[TimedStep] = []
        self._launched: dict[int, tuple[StepFeatures, int]] = {}
        self._previous_end_ns = 0

    def launched(self, step: RunStep, now_ns: int) -> None:
        self._launched[step.step_id] = (features_of(step.plan), now_ns)

    def finished(self, event: StepFinished, core_us: float = 0.0) -> None:
        """Only for steps that ran once: repetitions have no ends of their own to tell apart here."""
        features, launched_ns = self._launched.pop(event.step_id)
        (end_ns,) = event.ends_ns
        start_ns = max(launched_ns, self._previous_end_ns)
        self._previous_end_ns = end_ns
        self.steps.append(TimedStep(features, (end_ns - start_ns) / 1e3, core_us))


def logged_steps(records: Iterable[HandledEvent | Polled]) -> list[TimedStep]:
    """The steps of a live log, of all its instances."""
    timers: dict[InstanceId, StepTimer] = {}
    for record in records:
        timer = timers.setdefault(record.machine, StepTimer())
        if isinstance(record, HandledEvent):
            if isinstance(record.event, StepFinished):
                timer.finished(record.event)
            continue
        for effect in record.effects:
            if isinstance(effect, RunStep):
                timer.launched(effect, record.now_ns)
    return [step for timer in timers.values() for step in timer.steps]
