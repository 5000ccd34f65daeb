"""The metrics in Prometheus' form. Names of vLLM sum over all instances; ours tell instances apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm.server.engine import Engine, InstanceSnapshot
from sagellm.server.prometheus.bucket_counts import BucketCounts
from sagellm.server.prometheus.http_metrics import HttpMetrics
from sagellm.server.prometheus.serving_metrics import ServingMetrics

_LABELS = ("model_name", "engine")
_INSTANCE = ("model_name", "instance_id")
_WHOLE_SERVER = "0"  # the engine's label: to a client all instances are one


@dataclass(frozen=True, slots=True, eq=False)  # a registry keeps collectors by identity
class MetricsCollector(Collector):
    """Asks everything for its figures when Prometheus does."""

    engine: Engine
    metrics: ServingMetrics
    http: HttpMetrics

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        snapshots = self.engine.snapshots()
        yield from self._server_gauges(snapshots)
        yield from self._server_counters(snapshots)
        yield from self._latencies()
        yield from self._sizes()
        yield from self._instances(snapshots)
        yield from _http(self.http)

    # --- vLLM's names --------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric((self.metrics.model_name, _WHOLE_SERVER), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return self._counters(name, text, "", {"": value})

    def _counters(self, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
        labels = (*_LABELS, label) if label else _LABELS
        family = CounterMetricFamily(name, text, labels=labels)
        for key, value in values.items():
            server = (self.metrics.model_name, _WHOLE_SERVER)
            family.add_metric((*server, key) if label else server, value)
        return family

    def _histogram(self, name: str, text: str, counts: BucketCounts) -> Metric:
        family = HistogramMetricFamily(name, text, labels=_LABELS)
        family.add_metric((self.metrics.model_name, _WHOLE_SERVER), counts.cumulative(), counts.total)
        return family

    def _server_gauges(self, snapshots: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
        alive = [each for each in snapshots if not each.is_lost]
        num_running = sum(each.status.num_running for each in alive)
        num_waiting = self.engine.num_queued + sum(each.status.num_waiting for each in alive)
        yield self._gauge("vllm:num_requests_running", "Requests in execution.", num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait, queued anywhere.", num_waiting)
        usage = kv_usage(alive)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same, under its older name.", usage)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache.", labels=(*_LABELS, "block_size", "num_gpu_blocks")
        )
        block_size = str(max((each.block_size for each in snapshots), default=0))
        num_blocks = str(sum(each.num_blocks for each in alive))
        info.add_metric((self.metrics.model_name, _WHOLE_SERVER, block_size, num_blocks), 1)
        yield info

    def _server_counters(self, snapshots: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
        metrics, statuses = self.metrics, [each.status for each in snapshots]
        num_hits = sum(each.num_prefix_hit_tokens for each in statuses)
        yield self._counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in prefix caches.",
            sum(each.num_prefix_query_tokens for each in statuses),
        )
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found there.", num_hits)
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens found in prefix caches.", num_hits)
        sources = {
            "local_compute": float(sum(each.num_prompt_tokens for each in statuses)),
            "local_cache_hit": float(num_hits),
        }
        yield self._counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV is from.", "source", sources
        )
        yield self._counter(
            "vllm:num_preemptions", "Requests preempted.", sum(each.num_preemptions for each in statuses)
        )
        yield self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began.", metrics.num_prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Output tokens.", metrics.num_output_tokens)
        finished = {reason.value: float(count) for reason, count in metrics.num_finished.items()}
        yield self._counters("vllm:request_success", "Requests that ended.", "finished_reason", finished)
        yield self._counter("vllm:corrupted_requests", "Requests whose logits were not finite.", finished["error"])

    def _latencies(self) -> Iterator[Metric]:
        times = self.metrics.latencies
        rows = (
            ("vllm:time_to_first_token_seconds", "Arrival to first token.", times.ttft),
            ("sagellm:time_to_first_token_seconds", "The same, with 0.2, 2 and 3 s as bounds.", times.ttft_with_slos),
            ("vllm:inter_token_latency_seconds", "Gaps between a request's tokens.", times.token_gap),
            ("vllm:time_per_output_token_seconds", "The same, under its older name.", times.token_gap),
            (
                "vllm:request_time_per_output_token_seconds",
                "First to last token over tokens less one; requests of one token do not count.",
                times.tpot,
            ),
            ("vllm:e2e_request_latency_seconds", "Arrival to last token.", times.end_to_end),
            ("vllm:request_queue_time_seconds", "Arrival until an instance was given the request.", times.queue),
            ("vllm:request_inference_time_seconds", "From then to the last token.", times.inference),
            ("vllm:request_prefill_time_seconds", "From then to the first token.", times.prefill),
            ("vllm:request_decode_time_seconds", "First to last token.", times.decode),
        )
        return (self._histogram(*row) for row in rows)

    def _sizes(self) -> Iterator[Metric]:
        sizes = self.metrics.sizes
        rows = (
            ("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes.prompt),
            ("vllm:request_generation_tokens", "Output tokens of a request.", sizes.output),
            ("vllm:request_params_max_tokens", "Output tokens that a request allowed.", sizes.max_tokens),
            ("vllm:request_max_num_generation_tokens", "The same for each of its choices.", sizes.max_tokens),
            ("vllm:request_params_n", "Choices that a request wanted.", sizes.num_choices),
            (
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens that were in no prefix cache.",
                sizes.prefill_computed,
            ),
            ("vllm:iteration_tokens_total", "Tokens of a step, averaged between an instance's reports.", sizes.step),
        )
        return (self._histogram(*row) for row in rows)

    # --- our own ---------------------------------------------------------------------------------------------

    def _instances(self, snapshots: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
        rejected = {("later" if key else "never"): float(count) for key, count in self.metrics.num_rejected.items()}
        yield self._counters("sagellm:requests_rejected", "Refused, by when to try again.", "try_again", rejected)
        yield self._gauge("sagellm:queue_depth", "Requests with no instance yet.", self.engine.num_queued)
        yield self._gauge("sagellm:requests_unfinished", "Requests that are not over.", self.engine.num_unfinished)
        info = GaugeMetricFamily("sagellm:instance_info", "What an instance is.", labels=(*_INSTANCE, "role", "device"))
        for each in snapshots:
            info.add_metric((self.metrics.model_name, each.instance_id, each.role.value, each.device), 1)
        yield info
        gauges = (
            ("up", "1 while the instance serves.", lambda each: float(not each.is_lost)),
            ("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", lambda each: kv_usage([each])),
            ("requests_running", "Requests in execution.", lambda each: each.status.num_running),
            ("requests_waiting", "Requests that wait there.", lambda each: each.status.num_waiting),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"sagellm:instance_{name}", text, labels=_INSTANCE)
            for each in snapshots:
                gauge.add_metric((self.metrics.model_name, each.instance_id), value(each))
            yield gauge
        counters = (
            ("steps", "Forward passes.", lambda each: each.status.num_steps),
            ("prompt_tokens", "Prompt tokens computed.", lambda each: each.status.num_prompt_tokens),
            ("generation_tokens", "Output tokens.", lambda each: each.status.num_output_tokens),
            ("preemptions", "Requests preempted.", lambda each: each.status.num_preemptions),
            ("core_seconds", "Time spent on decisions; over steps: the core's share.", _core_s),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"sagellm:instance_{name}", text, labels=_INSTANCE)
            for each in snapshots:
                counter.add_metric((self.metrics.model_name, each.instance_id), value(each))
            yield counter


def kv_usage(snapshots: Sequence[InstanceSnapshot]) -> float:
    """Share of these instances' KV blocks that are in use."""
    num_blocks = sum(each.num_blocks for each in snapshots)
    return sum(each.status.num_blocks_in_use for each in snapshots) / num_blocks if num_blocks else 0.0


def _core_s(snapshot: InstanceSnapshot) -> float:
    return snapshot.status.core_ns / 1e9


def _http(http: HttpMetrics) -> Iterator[Metric]:
    requests = CounterMetricFamily("http_requests", "HTTP requests.", labels=("handler", "method", "status"))
    for key, count in http.counts.items():
        requests.add_metric(key, count)
    yield requests
    durations = HistogramMetricFamily(
        "http_request_duration_seconds", "Until the last byte of the answer.", labels=("handler", "method")
    )
    for handler_method, counts in http.durations_s.items():
        durations.add_metric(handler_method, counts.cumulative(), counts.total)
    yield durations
