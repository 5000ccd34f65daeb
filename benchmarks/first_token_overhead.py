"""How long a first token takes through the whole server while others stream, beyond what its steps take.

    python benchmarks/first_token_overhead.py [--probes N] [--json FILE]

The server runs in a process of its own: HTTP, front, and an instance as a thread whose steps take as long as they are
told to and give made-up tokens. Clients are bare sockets in this process. While some stream, probes ask for one token
each, one after the other, at random moments. A probe waits for half of the step under way, the whole of the one that
is planned already, and its own: two steps and a half on average. What it takes beyond is HTTP, the front, which is busy
with the tokens of the others, and the client.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from aiohttp import web
from serving_overhead import make_engine
from serving_overhead_http import Load, StreamClient, load_of

from backends.null.executor import NullExecutor
from sagellm.server.app import create_app, make_runner
from sagellm.server.app_settings import AppSettings
from sagellm.server.prometheus.serving_metrics import ServingMetrics

MODEL = "paced"
CASES = ((32, 7.0), (256, 40.0))  # streams, and a step's milliseconds: an H200 at 16 and 32 conversations a second
STEPS_OF_A_PROBE = 2.5
STREAM_TOKENS = 4000
APART_S = 0.002
SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Of the probes of one case."""

    num_streams: int
    step_ms: float
    num_probes: int
    mean_ms: float
    median_ms: float
    p90_ms: float
    steps_per_s: float  # that the streams saw

    @property
    def beyond_ms(self) -> float:
        return self.mean_ms - STEPS_OF_A_PROBE * self.step_ms


async def serve_paced(num_streams: int, step_ms: float) -> None:
    """Serve until standard input ends."""
    engine = make_engine(num_streams, lambda settings: NullExecutor(settings, lambda _: round(step_ms * 1e6)))
    await engine.start()
    app = create_app(
        engine, AppSettings((MODEL,), max_model_len=1 << 16, vocab_size=257), ServingMetrics(MODEL, 1 << 16)
    )
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await engine.drain(0)
    await runner.cleanup()


async def connected(load: Load) -> StreamClient:
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()
    end.add_done_callback(lambda done: done.exception())  # streams are cut off at the end, probes are waited for
    _, client = await loop.create_connection(lambda: StreamClient(load, end), load.host, load.port)
    return client


async def probe_ms(load: Load, pause_s: float) -> float:
    """From a request to its first token."""
    client = await connected(load)
    await asyncio.sleep(pause_s)  # the connection is there before
    client.send()
    while not client.num_events:
        await asyncio.sleep(0.0005)
    return client.first_event_s * 1e3


async def measure(url: str, num_streams: int, step_ms: float, num_probes: int) -> FirstTokens:
    streams = [await connected(load_of(url, STREAM_TOKENS, is_chat=False)) for _ in range(num_streams)]
    for stream in streams:
        stream.send()
        await asyncio.sleep(APART_S)
    while not all(stream.num_events for stream in streams):
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_S)
    rng, load = random.Random(0), load_of(url, 1, is_chat=False)
    num_before, start_s = sum(stream.num_events for stream in streams), time.perf_counter()
    times_ms = sorted([await probe_ms(load, rng.uniform(0.02, 0.02 + 2e-3 * step_ms)) for _ in range(num_probes)])
    num_events = sum(stream.num_events for stream in streams) - num_before
    return FirstTokens(
        num_streams=num_streams,
        step_ms=step_ms,
        num_probes=num_probes,
        mean_ms=statistics.fmean(times_ms),
        median_ms=statistics.median(times_ms),
        p90_ms=times_ms[int(0.9 * num_probes)],
        steps_per_s=num_events / num_streams / (time.perf_counter() - start_s),
    )


def measured_case(num_streams: int, step_ms: float, num_probes: int) -> FirstTokens:
    command = [sys.executable, __file__, "--server", str(num_streams), str(step_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            return asyncio.run(measure(server.stdout.readline().strip(), num_streams, step_ms, num_probes))
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=100, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--server", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server is not None:
        asyncio.run(serve_paced(int(options.server[0]), float(options.server[1])))
        return
    print(f"{'streams':>8}{'step ms':>9}{'steps/s':>9}{'mean ms':>9}{'p50':>8}{'p90':>8}{'beyond its steps':>18}")
    results = []
    for num_streams, step_ms in CASES:
        result = measured_case(num_streams, step_ms, options.probes)
        results.append(result)
        print(
            f"{num_streams:>8}{step_ms:>9.1f}{result.steps_per_s:>9.1f}{result.mean_ms:>9.1f}"
            f"{result.median_ms:>8.1f}{result.p90_ms:>8.1f}{result.beyond_ms:>18.1f}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
