"""Sends a trace to a server: each request at its recorded time, whatever came of those before it.

Only a follow-up in a session waits, for the answer before it. The clock is monotonic, and zero at the
beginning of the trace.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns, perf_counter

import aiohttp

from sagellm.core.identity import RequestId
from sagellm.core.request import LatencySLO, RequestSpec
from sagellm.core.run_metrics import RequestRecord, RunMetrics
from sagellm.load_client.answer import Answer
from sagellm.load_client.completion_request import completion_body
from sagellm.load_client.completion_stream import open_session, stream_completion
from sagellm.load_client.endpoint import Endpoint
from sagellm.load_client.readiness import probe, served_model
from traces.request_trace import Trace

LEAD_IN_NS = 50_000_000  # so that the first request is not late
LAG_EVERY_NS = 20_000_000


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How to send. ``nonce`` keeps this run's prompts apart from those of every other run."""

    endpoint: Endpoint
    model: str | None = None  # None: the first that the server lists
    timeout_s: float = 3600.0  # for one request, from start to end
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the client saw.

    A request's arrival in ``metrics`` is the moment at which it was sent. ``lateness_ns`` says for each
    how long after its time that was, in no particular order.
    """

    model: str
    metrics: RunMetrics
    lateness_ns: array[int]
    lag_ns: array[int]  # how late the client came to what was due, looked at all the time: so late are its readings
    failures: Counter[str]  # why requests failed or were rejected, and how many
    wall_s: float


def find_model(settings: LoadSettings) -> str:
    """Whether the server is there, and the name of the model that it will be asked for.

    Raises:
        ServerUnusableError: it is not there, refuses, or does not serve the model.
    """

    async def ask() -> str:
        async with open_session(settings.endpoint, settings.timeout_s) as session:
            return await served_model(session, settings.endpoint, settings.model)

    return asyncio.run(ask())


def replay_on_server(
    settings: LoadSettings,
    trace: Trace,
    *,
    slo: LatencySLO | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> LoadResult:
    """Send the whole trace, and wait for the end of its last request.

    Raises:
        ServerUnusableError: the server is not there, or does not serve such requests.
    """
    return asyncio.run(_replay(settings, trace, slo or LatencySLO(), on_progress))


async def _replay(
    settings: LoadSettings, trace: Trace, slo: LatencySLO, on_progress: Callable[[int], None] | None
) -> LoadResult:
    started_s = perf_counter()
    async with open_session(settings.endpoint, settings.timeout_s) as session:
        model = await served_model(session, settings.endpoint, settings.model)
        await probe(session, settings.endpoint, model, monotonic_ns, settings.nonce)
        sender = _Sender(session, settings, model, trace, on_progress)
        with _garbage_set_aside():
            await sender.send_all()
    return LoadResult(
        model=model,
        metrics=metrics_of(sender.answers, trace, slo),
        lateness_ns=sender.lateness_ns,
        lag_ns=sender.lag_ns,
        failures=Counter(why for answer in sender.answers.values() if (why := answer.reject_reason or answer.failure)),
        wall_s=perf_counter() - started_s,
    )


class _Sender:
    """Releases requests and gathers their answers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: LoadSettings,
        model: str,
        trace: Trace,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.answers: dict[int, Answer] = {}
        self.lateness_ns: array[int] = array("q")
        self.lag_ns: array[int] = array("q")
        self._session = session
        self._url = settings.endpoint.url("/v1/completions")
        self._nonce = settings.nonce
        self._model = model
        self._trace = trace
        self._on_progress = on_progress
        self._start_ns = 0
        self._followers: dict[int, list[int]] = {}
        for index, request in enumerate(trace.requests):
            if request.previous is not None:
                self._followers.setdefault(request.previous, []).append(index)

    async def send_all(self) -> None:
        self._start_ns = monotonic_ns() + LEAD_IN_NS
        requests = enumerate(self._trace.requests)
        firsts = sorted((request.arrival_ns, index) for index, request in requests if request.previous is None)
        watch = asyncio.create_task(self._watch())
        async with asyncio.TaskGroup() as tasks:
            for due_ns, index in firsts:
                # The body is made while there is time, and the loop holds no more than one unsent body.
                body = self._body(index)
                await self._sleep_until(due_ns)
                tasks.create_task(self._send(tasks, index, body, due_ns))
        watch.cancel()

    async def _watch(self) -> None:
        while True:
            due_ns = self._now_ns() + LAG_EVERY_NS
            await self._sleep_until(due_ns)
            self.lag_ns.append(self._now_ns() - due_ns)

    def _now_ns(self) -> int:
        return monotonic_ns() - self._start_ns

    async def _sleep_until(self, due_ns: int) -> None:
        await asyncio.sleep(max(0, due_ns - self._now_ns()) / 1e9)

    def _body(self, index: int) -> bytes:
        return completion_body(self._trace, index, self._model, self._nonce)

    async def _send(self, tasks: asyncio.TaskGroup, index: int, body: bytes, due_ns: int) -> None:
        """Send a request; those that follow it are sent when it is over, however it ended."""
        num_output_tokens = self._trace.requests[index].num_output_tokens
        request_id = f"replay-{self._nonce}-{index}"
        self.lateness_ns.append(self._now_ns() - due_ns)
        answer = await stream_completion(self._session, self._url, body, num_output_tokens, self._now_ns, request_id)
        self.answers[index] = answer
        if self._on_progress is not None:
            self._on_progress(len(self.answers))
        for follower in self._followers.get(index, ()):
            tasks.create_task(self._send_later(tasks, follower, answer.end_ns))

    async def _send_later(self, tasks: asyncio.TaskGroup, index: int, previous_end_ns: int) -> None:
        request = self._trace.requests[index]
        due_ns = max(request.arrival_ns, previous_end_ns + request.gap_ns)
        body = self._body(index)
        await self._sleep_until(due_ns)
        await self._send(tasks, index, body, due_ns)


def metrics_of(answers: dict[int, Answer], trace: Trace, slo: LatencySLO) -> RunMetrics:
    """The answers in the form of a run's metrics; what a client cannot see stays empty."""
    metrics = RunMetrics()
    for index in sorted(answers, key=lambda index: (answers[index].sent_ns, index)):
        answer, request = answers[index], trace.requests[index]
        spec = RequestSpec(
            request_id=RequestId(str(index)),
            arrival_ns=answer.sent_ns,
            num_prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.num_output_tokens,
            priority=request.priority,
            slo=slo,
            content_ids=request.content_ids,
            content_block_size=trace.content_block_size,
        )
        metrics.requests[spec.request_id] = RequestRecord(
            spec,
            num_output_tokens=answer.num_output_tokens,
            num_cached_tokens=answer.num_cached_tokens or 0,
            first_token_ns=answer.first_token_ns,
            last_token_ns=answer.last_token_ns,
            finish_reason=answer.finish_reason,
            reject_reason=answer.reject_reason,
        )
        metrics.itl_ns.extend(answer.gaps_ns)
        if answer.num_cached_tokens is not None:
            metrics.num_prompt_tokens_queried += request.num_prompt_tokens
            metrics.num_prompt_tokens_hit += answer.num_cached_tokens
    metrics.itl_count.extend([1] * len(metrics.itl_ns))
    return metrics


@contextmanager
def _garbage_set_aside() -> Iterator[None]:
    """What is there already (the trace, above all) is not searched for garbage again while times are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
