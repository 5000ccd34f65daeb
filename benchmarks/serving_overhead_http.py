"""What HTTP costs: streams through the whole server before an engine that costs nothing.

    python benchmarks/serving_overhead_http.py [--streams N] [--tokens N] [--in-a-row N] [--chat] [--json FILE]
    python benchmarks/serving_overhead_http.py --url http://HOST:PORT ...

The server runs in a process of its own, and its engine gives every unfinished request one token, made
up, in turn. Clients are bare sockets in this process, so that they cost little beside the server. Two
loads, after a short one that warms up:

* `--streams` at once, each of `--tokens` output tokens, an event for each token. Printed are the rate,
  the server's processor time for each token, the longest wait for a first token, and the tokens of
  the slowest stream over those of the fastest while all were being served;
* `--in-a-row` requests of 16 tokens, 32 at a time, after which the server must hold none of them, and
  its memory is compared with what it was after the first tenth.

With `--url` the same loads go to a server that runs already, `sagellm serve --backend none`, say; its
processor time and memory are then not known here. Memory is read as Linux tells it.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aiohttp import web

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import EmitTokens, RequestArrived, RequestFinished
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.server.app import create_app, make_runner
from sagellm.server.app_settings import AppSettings
from sagellm.server.engine import InstanceSnapshot, InstanceStatus, OutputDelta, RequestOutcome
from sagellm.server.prometheus.serving_metrics import ServingMetrics

MODEL = "free"
INSTANCE_ID = InstanceId("free-0")
CONCURRENCY_IN_A_ROW = 32
TOKENS_IN_A_ROW = 16
WARM_UP_REQUESTS = 200
SIDE_BY_SIDE_TOKENS_MIN = 50
EVENT_START = b'data: {"id"'
TEXT = b"The quick brown fox jumps over the lazy dog. "


# --- the server ------------------------------------------------------------------------------------------


class FreeEngine:
    """An `Engine` without model, processes or scheduling. Requests take turns, a token each."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self._metrics = metrics
        self._running: set[RequestId] = set()
        self.is_alive = True
        self.is_draining = False
        self.num_queued = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._running)

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self._running.discard(request_id)

    def snapshots(self) -> tuple[InstanceSnapshot, ...]:
        status = InstanceStatus(INSTANCE_ID, self.num_unfinished, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        return (InstanceSnapshot(INSTANCE_ID, Role.MIXED, "none", 1, 16, 1 << 20, False, status),)

    async def drain(self, grace_s: float) -> None:
        self.is_draining = True

    async def submit(self, request: RequestSpec) -> AsyncIterator[OutputDelta | RequestOutcome]:
        request_id, observe = request.request_id, self._metrics.observe
        self._running.add(request_id)
        observe(self.now_ns(), RequestArrived(request))
        for index in range(request.max_output_tokens):
            await asyncio.sleep(0)
            if request_id not in self._running:
                break
            token_ids, now_ns = (TEXT[index % len(TEXT)],), self.now_ns()
            observe(now_ns, EmitTokens(INSTANCE_ID, index, (request_id,), (now_ns,), (token_ids,)))
            yield OutputDelta(token_ids, (), 0)
        self._running.discard(request_id)
        observe(self.now_ns(), RequestFinished(request_id, INSTANCE_ID, FinishReason.LENGTH, request.max_output_tokens))
        yield RequestOutcome(FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class ServerUse:
    """What the server says of itself."""

    cpu_s: float
    rss_kib: int
    rss_peak_kib: int
    num_unfinished: int
    num_requests_kept: int  # by the metrics


async def serve_free_engine() -> None:
    """Serve until standard input ends."""
    metrics = ServingMetrics(MODEL, 1 << 16)
    engine = FreeEngine(metrics)
    app = create_app(engine, AppSettings((MODEL,), max_model_len=1 << 16, vocab_size=257), metrics)

    async def use(_request: web.Request) -> web.Response:
        own = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = own.ru_utime + own.ru_stime
        rss_kib = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
        said = ServerUse(cpu_s, rss_kib, own.ru_maxrss, engine.num_unfinished, metrics.num_requests_kept)
        return web.json_response(asdict(said))

    app.router.add_get("/use", use)
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


# --- the clients -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, and of whom."""

    host: str
    port: int
    raw: bytes  # the whole HTTP request


def load_of(url: str, num_tokens: int, is_chat: bool) -> Load:
    body = {"model": None, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    prompt = TEXT.decode() * 4
    body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    raw = json.dumps(body).encode()
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    return Load(host, int(port or 80), head.encode() + raw)


class StreamClient(asyncio.Protocol):
    """One stream, of which events are counted and nothing else is looked at."""

    def __init__(self, load: Load, done: "asyncio.Future[None]") -> None:
        self._load = load
        self._done = done
        self._transport: asyncio.Transport
        self._is_whole = False  # the mark at the end is there
        self._tail = b""  # may be the first part of an event's start
        self._start_s = 0.0
        self.num_events = 0
        self.first_event_s = 0.0  # after the start

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        self._start_s = time.perf_counter()
        self._transport.write(self._load.raw)

    def data_received(self, data: bytes) -> None:
        if not self.num_events:
            self.first_event_s = time.perf_counter() - self._start_s
        data = self._tail + data
        self.num_events += data.count(EVENT_START)
        self._is_whole |= b"[DONE]" in data
        self._tail = data[1 - len(EVENT_START) :]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_whole:
            self._done.set_result(None)
        else:
            self._done.set_exception(ConnectionError(f"a stream ended after {self.num_events} events: {exc}"))


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """Many streams at once."""

    num_streams: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    cpu_us_per_token: float | None
    first_token_s_max: float
    progress_of_slowest: float | None  # over the fastest's, from all begun to the first end; None: too short to tell
    rss_peak_mib: float | None


async def stream_at_once(load: Load, num_streams: int) -> tuple[list[StreamClient], list[int]]:
    """All clients, and how many events each got while all were being served: from all begun to the first end."""
    loop = asyncio.get_running_loop()
    ends = [loop.create_future() for _ in range(num_streams)]
    clients = [StreamClient(load, end) for end in ends]
    await asyncio.gather(*(loop.create_connection(lambda c=c: c, load.host, load.port) for c in clients))
    for client in clients:
        client.send()
    while not all(client.num_events for client in clients):
        await asyncio.sleep(0.01)
    begun = [client.num_events for client in clients]
    were_all_at_once = not any(end.done() for end in ends)
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    progress = [client.num_events - at_first for client, at_first in zip(clients, begun, strict=True)]
    await asyncio.gather(*ends)
    return clients, progress if were_all_at_once else []


def progress_of_slowest(progress: Sequence[int]) -> float | None:
    """Over the fastest's; None where the streams were side by side for too few tokens to compare."""
    if max(progress, default=0) < SIDE_BY_SIDE_TOKENS_MIN:
        return None
    return min(progress) / max(progress)


def measure_streams(url: str, use: "UseOf", num_streams: int, num_tokens: int, is_chat: bool) -> StreamsResult:
    load = load_of(url, num_tokens, is_chat)
    before, start_s = use(), time.perf_counter()
    clients, progress = asyncio.run(stream_at_once(load, num_streams))
    wall_s, after = time.perf_counter() - start_s, use()
    total = num_streams * num_tokens
    num_expected = num_tokens + is_chat
    short = [client.num_events for client in clients if client.num_events != num_expected]
    if short and not is_real(use):
        raise AssertionError(f"{len(short)} streams did not get {num_expected} events, but {sorted(set(short))}")
    known = before is not None and after is not None
    return StreamsResult(
        num_streams=num_streams,
        num_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=total / wall_s,
        cpu_us_per_token=(after.cpu_s - before.cpu_s) / total * 1e6 if known else None,
        first_token_s_max=max(client.first_event_s for client in clients),
        progress_of_slowest=progress_of_slowest(progress),
        rss_peak_mib=after.rss_peak_kib / 1024 if known else None,
    )


@dataclass(frozen=True, slots=True)
class InARowResult:
    """Many short requests, one after the other."""

    num_requests: int
    wall_s: float
    requests_per_s: float
    cpu_us_per_request: float | None
    num_unfinished: int | None  # afterwards
    num_requests_kept: int | None
    rss_growth_kib: int | None  # from the first tenth to the end


async def request_in_a_row(load: Load, num_requests: int) -> None:
    loop = asyncio.get_running_loop()
    left = iter(range(num_requests))

    async def client() -> None:
        for _ in left:
            end: asyncio.Future[None] = loop.create_future()
            _, stream = await loop.create_connection(lambda end=end: StreamClient(load, end), load.host, load.port)
            stream.send()
            await end

    await asyncio.gather(*(client() for _ in range(CONCURRENCY_IN_A_ROW)))


def measure_in_a_row(url: str, use: "UseOf", num_requests: int, is_chat: bool) -> InARowResult:
    load = load_of(url, TOKENS_IN_A_ROW, is_chat)
    num_first = num_requests // 10
    asyncio.run(request_in_a_row(load, num_first))
    before, start_s = use(), time.perf_counter()
    asyncio.run(request_in_a_row(load, num_requests - num_first))
    wall_s, after = time.perf_counter() - start_s, use()
    num_timed = num_requests - num_first
    known = before is not None and after is not None
    return InARowResult(
        num_requests=num_requests,
        wall_s=wall_s,
        requests_per_s=num_timed / wall_s,
        cpu_us_per_request=(after.cpu_s - before.cpu_s) / num_timed * 1e6 if known else None,
        num_unfinished=after.num_unfinished if known else None,
        num_requests_kept=after.num_requests_kept if known else None,
        rss_growth_kib=after.rss_kib - before.rss_kib if known else None,
    )


# --- both together ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UseOf:
    """Asks the server of this benchmark what it has used; of any other server nothing is known."""

    url: str | None

    def __call__(self) -> ServerUse | None:
        if self.url is None:
            return None
        with urllib.request.urlopen(f"{self.url}/use", timeout=30) as answer:
            return ServerUse(**json.load(answer))


def is_real(use: UseOf) -> bool:
    """A real server may put several tokens in one event."""
    return use.url is None


def measure(url: str, use: UseOf, options: argparse.Namespace) -> tuple[StreamsResult, InARowResult]:
    measure_in_a_row(url, use, WARM_UP_REQUESTS, options.chat)
    streams = measure_streams(url, use, options.streams, options.tokens, options.chat)
    return streams, measure_in_a_row(url, use, options.in_a_row, options.chat)


def report(streams: StreamsResult, in_a_row: InARowResult) -> str:
    lines = [f"{streams.num_streams:,} streams of {streams.num_tokens} tokens at once"]
    lines.append(f"  {streams.tokens_per_s:,.0f} tokens/s, {streams.wall_s:.1f} s")
    if streams.cpu_us_per_token is not None:
        lines.append(f"  {streams.cpu_us_per_token:.1f} us of the server's processor time for each token")
        lines.append(f"  {streams.rss_peak_mib:.0f} MiB at most")
    lines.append(f"  {streams.first_token_s_max:.2f} s until the last stream had its first token")
    if streams.progress_of_slowest is None:
        lines.append("  the streams were hardly ever side by side: give them more tokens")
    else:
        lines.append(f"  slowest stream at {streams.progress_of_slowest:.2f} of the fastest's pace")
    lines.append(f"{in_a_row.num_requests:,} requests of {TOKENS_IN_A_ROW} tokens, {CONCURRENCY_IN_A_ROW} at a time")
    lines.append(f"  {in_a_row.requests_per_s:,.0f} requests/s")
    if in_a_row.cpu_us_per_request is not None:
        lines.append(f"  {in_a_row.cpu_us_per_request:,.0f} us of the server's processor time for each")
        lines.append(f"  left behind: {in_a_row.num_unfinished} requests, {in_a_row.num_requests_kept} in the metrics,")
        lines.append(f"  {in_a_row.rss_growth_kib:,} KiB of memory since the first tenth")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--in-a-row", type=int, default=10_000)
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions instead of /v1/completions")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.server:
        asyncio.run(serve_free_engine())
        return
    if options.url:
        results = measure(options.url, UseOf(None), options)
    else:
        command = [sys.executable, __file__, "--server"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            results = measure(url, UseOf(url), options)
            server.communicate()
    print(report(*results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
