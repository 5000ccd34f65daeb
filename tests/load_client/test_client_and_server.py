"""The client against a real HTTP server whose answers are written beforehand."""

import time
from dataclasses import replace

import pytest
from scripted_server import (
    MODEL,
    Answer,
    after_all_have_come,
    event,
    raw,
    refusing,
    scripted_server,
    streaming,
    text_event,
    usage_event,
)

from sagellm.core.request import FinishReason
from sagellm.core.run_metrics import RequestRecord
from sagellm.load_client import readiness
from sagellm.load_client.endpoint import Endpoint, ServerUnusableError, parse_base_url
from sagellm.load_client.replay_on_server import LoadResult, LoadSettings, replay_on_server
from traces.request_trace import Trace, TraceRequest

MS = 1_000_000
TOLERANCE_NS = 150 * MS  # a machine with other work to do
DONE = b"data: [DONE]\n\n"


def trace_of(*requests: TraceRequest, content_block_size: int = 0) -> Trace:
    return Trace("handmade", requests, content_block_size)


def every(gap_ms: int, number: int, num_output_tokens: int = 3) -> Trace:
    return trace_of(*(TraceRequest(i * gap_ms * MS, 5, num_output_tokens) for i in range(number)))


def answered(answer: Answer, trace: Trace | None = None, **settings: object) -> LoadResult:
    with scripted_server(answer) as (url, _):
        return replay_on_server(LoadSettings(Endpoint(url), **settings), trace or every(0, 1))


def only_record(result: LoadResult) -> RequestRecord:
    (record,) = result.metrics.requests.values()
    return record


def test_times_are_those_of_the_server() -> None:
    with scripted_server(streaming(gap_s=0.02)) as (url, seen):
        result = replay_on_server(LoadSettings(Endpoint(url)), every(7, 8, num_output_tokens=6))
    assert len(result.metrics.requests) == 8
    for request_id, record in result.metrics.requests.items():
        written_ns = seen.written_ns[request_id]
        assert record.finish_reason is FinishReason.LENGTH
        assert record.num_output_tokens == 6
        # The empty chunk at the beginning is no first token: that comes a gap later.
        assert record.ttft_ns is not None
        assert 0 <= record.ttft_ns - (written_ns[0] - seen.received_ns[request_id]) < TOLERANCE_NS
        assert record.tpot_ns == pytest.approx((written_ns[-1] - written_ns[0]) / 5, abs=TOLERANCE_NS / 5)
    assert len(result.metrics.itl_ns) == 8 * 5
    assert min(result.metrics.itl_ns) >= 0


def test_arrivals_keep_their_recorded_times_while_answers_take_long() -> None:
    with scripted_server(streaming(gap_s=0.1)) as (url, seen):
        result = replay_on_server(LoadSettings(Endpoint(url)), every(40, 6))
    first_ns = min(seen.received_ns.values())
    for index in range(6):
        since_first_ns = seen.received_ns[str(index)] - first_ns
        assert since_first_ns == pytest.approx(index * 40 * MS, abs=TOLERANCE_NS)
    # Open loop: the last was sent before the first, which takes 300 ms, was over.
    assert seen.received_ns["5"] < seen.ended_ns["0"]
    assert len(result.lateness_ns) == 6
    assert all(-MS < late_ns < TOLERANCE_NS for late_ns in result.lateness_ns)


def test_a_follow_up_waits_for_the_answer_and_its_gap() -> None:
    first = TraceRequest(0, 5, 3)
    after_a_gap = TraceRequest(1 * MS, 5, 2, previous=0, gap_ns=30 * MS)
    at_its_time = TraceRequest(400 * MS, 5, 2, previous=1, gap_ns=0)
    with scripted_server(streaming(gap_s=0.02)) as (url, seen):
        replay_on_server(LoadSettings(Endpoint(url)), trace_of(first, after_a_gap, at_its_time))
    assert seen.received_ns["1"] >= seen.ended_ns["0"] + 25 * MS
    assert seen.received_ns["2"] - seen.received_ns["0"] > 390 * MS
    assert seen.received_ns["2"] > seen.ended_ns["1"]


def test_a_follow_up_is_sent_though_the_one_before_it_failed() -> None:
    trace = trace_of(TraceRequest(0, 5, 3), TraceRequest(0, 5, 3, previous=0))
    result = answered(refusing(500, "broken"), trace)
    assert result.failures == {"the server answered 500: broken": 2}


def test_what_is_sent_is_what_was_recorded() -> None:
    shared, own = TraceRequest(0, 40, 3, content_ids=(1, 2, 3)), TraceRequest(0, 40, 4, content_ids=(1, 2, 4))
    trace = trace_of(shared, own, replace(own, priority=-2), content_block_size=16)
    with scripted_server(streaming()) as (url, seen):
        replay_on_server(LoadSettings(Endpoint(url, api_key="secret")), trace)
    one, other = seen.bodies["0"], seen.bodies["1"]
    assert one["prompt"][:32] == other["prompt"][:32] != one["prompt"][8:40]
    assert one["prompt"][32:] != other["prompt"][32:]
    assert {key: one[key] for key in one if key != "prompt"} == {
        "model": MODEL,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "temperature": 0.0,
        "ignore_eos": True,
    }
    assert seen.bodies["2"]["priority"] == -2
    assert seen.headers["0"]["Authorization"] == "Bearer secret"


def test_usage_counts_tokens_where_chunks_hold_several() -> None:
    result = answered(streaming(tokens_per_chunk=4), every(0, 1, num_output_tokens=12))
    record = only_record(result)
    assert record.num_output_tokens == 12
    assert len(result.metrics.itl_ns) == 2
    assert record.num_cached_tokens == 16
    assert (result.metrics.num_prompt_tokens_queried, result.metrics.num_prompt_tokens_hit) == (5, 16)


def test_without_usage_chunks_are_counted_and_cache_hits_are_unknown() -> None:
    result = answered(raw(text_event("a") + text_event("b") + text_event("", "length") + DONE))
    assert only_record(result).num_output_tokens == 2
    assert result.metrics.num_prompt_tokens_queried == 0


def test_tokens_without_text_are_tokens() -> None:
    with_ids = event([{"index": 0, "text": "", "token_ids": [7, 8], "finish_reason": None}])
    record = only_record(answered(raw(with_ids + text_event("", "length") + DONE)))
    assert record.num_output_tokens == 2
    assert record.first_token_ns is not None


def test_tokens_without_text_are_told_by_the_count_that_comes_along() -> None:
    def counted(text: str, num_tokens: int, reason: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": reason}
        return event([choice], usage={"prompt_tokens": 5, "completion_tokens": num_tokens})

    role, tokens, end = counted("", 0), counted("", 1) + counted("ab", 3) + counted("", 4), counted("", 4, "length")
    result = answered(raw(role + tokens + end + DONE))
    assert only_record(result).num_output_tokens == 4
    assert len(result.metrics.itl_ns) == 2  # three chunks brought tokens; the first and the last of all did not


COMPLETE = {
    "stop": (text_event("a", "stop") + DONE, FinishReason.STOP),
    "no end mark": (text_event("a", "length"), FinishReason.LENGTH),
    "no finish reason": (text_event("a") * 3 + DONE, FinishReason.LENGTH),
    "no finish reason, fewer tokens": (text_event("a") + DONE, FinishReason.STOP),
    "no text at all": (text_event("", "length") + usage_event(5, 3) + DONE, FinishReason.LENGTH),
    "CRLF": ((text_event("a", "length") + DONE).replace(b"\n", b"\r\n"), FinishReason.LENGTH),
}


@pytest.mark.parametrize(("stream", "reason"), COMPLETE.values(), ids=COMPLETE)
def test_answers_that_are_complete(stream: bytes, reason: FinishReason) -> None:
    result = answered(raw(stream))
    record = only_record(result)
    assert (record.finish_reason, record.reject_reason) == (reason, None)
    assert record.ttft_ns is not None
    assert not result.failures


BROKEN = {
    "error in the stream": (
        raw(text_event("a") + b'data: {"error": {"message": "out of luck", "code": 500}}\n\n' + DONE),
        "the server reported: out of luck",
    ),
    "error in the older form": (raw(b'data: {"object": "error", "message": "old"}\n\n'), "the server reported: old"),
    "error as text": (raw(b'data: {"error": "plain"}\n\n'), "the server reported: plain"),
    "not JSON": (raw(b"data: {oops}\n\n"), "the server sent an event that is no completion chunk"),
    "another shape": (raw(b'data: {"choices": 3}\n\n'), "the server sent an event that is no completion chunk"),
    "nothing": (raw(b""), "the stream ended before the answer was complete"),
    "ends too soon": (raw(text_event("a")), "the stream ended before the answer was complete"),
    "says done too soon": (raw(DONE), "the stream ended before the answer was complete"),
    "cut": (raw(text_event("a"), cut=True), "the connection failed"),
    "aborted": (raw(text_event("a", "abort") + DONE), "the server ended it with abort"),
    "not a stream": (refusing(200, {"choices": []}), "the server sent application/json where"),
    "server error": (refusing(500, {"error": {"message": "sorry"}}), "the server answered 500: sorry"),
    "not found": (refusing(404, "<p>no</p>", "text/html"), "the server answered 404: <p>no</p>"),
}


@pytest.mark.parametrize(("answer", "why"), BROKEN.values(), ids=BROKEN)
def test_answers_that_fail(answer: Answer, why: str) -> None:
    result = answered(answer)
    record = only_record(result)
    assert record.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
    assert record.e2el_ns is None
    (failure,) = result.failures
    assert failure.startswith(why)


@pytest.mark.parametrize("status", [400, 429, 503])
def test_refusals_are_rejections_and_nothing_is_sent_twice(status: int) -> None:
    with scripted_server(refusing(status, {"error": {"message": "full", "code": status}})) as (url, seen):
        result = replay_on_server(LoadSettings(Endpoint(url)), every(1, 4))
    assert [record.reject_reason for record in result.metrics.requests.values()] == [f"{status}: full"] * 4
    assert all(record.finish_reason is None for record in result.metrics.requests.values())
    assert result.failures == {f"{status}: full": 4}
    assert sorted(seen.bodies) == ["0", "1", "2", "3"]


def test_a_request_that_takes_too_long_fails_and_lets_go() -> None:
    started_s = time.monotonic()
    result = answered(streaming(gap_s=30), timeout_s=0.3)
    assert result.failures == {"no end within 0.3 s": 1}
    assert time.monotonic() - started_s < 10


def test_many_streams_at_once() -> None:
    # No limit on connections holds any back until another has ended: none ends before all are there.
    result = answered(after_all_have_come(300), every(0, 300), timeout_s=20)
    assert all(record.finish_reason is FinishReason.LENGTH for record in result.metrics.requests.values())


def test_progress_is_told_request_by_request() -> None:
    told: list[int] = []
    with scripted_server(streaming()) as (url, _):
        replay_on_server(LoadSettings(Endpoint(url)), every(1, 5), on_progress=told.append)
    assert told == [1, 2, 3, 4, 5]


def test_two_runs_share_no_prompt() -> None:
    with scripted_server(streaming()) as (url, seen):
        prompts = []
        for _ in range(2):
            replay_on_server(LoadSettings(Endpoint(url)), every(0, 1))
            prompts.append(seen.bodies["0"]["prompt"])
    assert prompts[0] != prompts[1]


def test_the_model_is_found_or_named() -> None:
    with scripted_server(streaming()) as (url, seen):
        assert replay_on_server(LoadSettings(Endpoint(url)), every(0, 1)).model == MODEL
        assert replay_on_server(LoadSettings(Endpoint(url), model="other"), every(0, 1)).model == "other"
        assert seen.bodies["0"]["model"] == "other"
        with pytest.raises(ServerUnusableError, match=f"does not serve 'third'; it serves {MODEL}, other"):
            replay_on_server(LoadSettings(Endpoint(url), model="third"), every(0, 1))


@pytest.mark.parametrize(
    ("models", "complaint"),
    [({"data": []}, "has no model"), ({"models": 3}, "no list of models"), ({"data": [{}]}, "no list of models")],
)
def test_a_server_without_models_is_refused(models: object, complaint: str) -> None:
    with scripted_server(streaming(), models=models) as (url, _), pytest.raises(ServerUnusableError, match=complaint):
        replay_on_server(LoadSettings(Endpoint(url)), every(0, 1))


def test_a_wrong_key_is_told_apart() -> None:
    with scripted_server(streaming(), api_key="right") as (url, _):
        with pytest.raises(ServerUnusableError, match="refuses the API key"):
            replay_on_server(LoadSettings(Endpoint(url, "wrong")), every(0, 1))
        assert len(replay_on_server(LoadSettings(Endpoint(url, "right")), every(0, 1)).metrics.requests) == 1


def test_nothing_is_sent_to_a_server_that_cannot_stream_completions() -> None:
    with scripted_server(streaming(), probe=refusing(404, {"error": {"message": "no such path"}})) as (url, seen):
        with pytest.raises(ServerUnusableError, match=r"did not serve a streamed completion .*404: no such path"):
            replay_on_server(LoadSettings(Endpoint(url)), every(0, 1))
        assert not seen.bodies


def test_a_port_where_nobody_listens() -> None:
    with scripted_server(streaming()) as (url, _):
        pass
    with pytest.raises(ServerUnusableError, match="nobody listens there"):
        replay_on_server(LoadSettings(Endpoint(url)), every(0, 1))


def test_a_server_that_is_not_ready_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "READY_WITHIN_S", 0.3)
    monkeypatch.setattr(readiness, "ASK_AGAIN_S", 0.05)
    with scripted_server(streaming()) as (url, _), pytest.raises(ServerUnusableError, match="404"):
        replay_on_server(LoadSettings(Endpoint(url + "/elsewhere")), every(0, 1))


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", " http://h:1/v1/ "])
def test_one_address_in_many_forms(text: str) -> None:
    assert parse_base_url(text) == "http://h:1"


@pytest.mark.parametrize("text", ["", "h:1", "ftp://h:1", "http://", "http://h:port", "http://h:99999", "http://h?x=1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:PORT"):
        parse_base_url(text)
