"""Each form is recognised by its content and read exactly; recorded files give their published figures."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from traces.reader import read_trace
from traces.request_trace import Trace, TraceRequest
from traces.statistics import TraceStatistics, trace_statistics

MILLISECOND = 1_000_000
SECOND = 1_000_000_000


def read_text(tmp_path: Path, text: str, *, seed: int = 0, name: str = "data") -> Trace:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_trace(path, seed=seed)


def shape(trace: Trace) -> list[tuple[int, int, int]]:
    return [(r.arrival_ns, r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests]


@cache
def recorded_statistics(path: Path) -> TraceStatistics:
    return trace_statistics(read_trace(path, seed=0))


def json_lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 23:59:59.6805901,374,44\r\n"
    "2023-11-17 00:00:00.0000000,396,109"
)


def test_azure_2023_keeps_all_seven_digits_across_midnight(tmp_path: Path) -> None:
    assert shape(read_text(tmp_path, AZURE_2023)) == [(0, 374, 44), (319_409_900, 396, 109)]


def test_azure_2024_takes_zones_and_whole_seconds(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,2399,6\n"
        "2024-05-10 02:00:02.5+02:00,76,15\n"
        "2024-05-10T00:00:03.25Z,77,16\n",
    )
    assert shape(trace) == [
        (0, 2162, 5),
        (990_070_000, 2399, 6),
        (2_490_070_000, 76, 15),
        (3_240_070_000, 77, 16),
    ]


def test_azure_2025_reads_over_images_and_says_so(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-15 12:00:00.000000,2,1500,20\n"
        "2024-10-15 12:00:00.000000,0,15,2\n",
    )
    assert shape(trace) == [(0, 1500, 20), (0, 15, 2)]
    assert "2 images" in trace.notes[0]


def test_plain_csv_takes_any_column_order_quotes_and_empty_lines(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        'num_decode_tokens,arrived_at,"num_prefill_tokens",extra\n\n"3",0.5,20,x\n4,1.000000001, 21 ,"a,b"\n\n',
    )
    assert shape(trace) == [(0, 20, 3), (500_000_001, 21, 4)]


def test_plain_csv_takes_exponents(tmp_path: Path) -> None:
    trace = read_text(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n0,1,1\n5e-07,2,2\n1E3,3,3\n")
    assert [arrival for arrival, _, _ in shape(trace)] == [0, 500, 1000 * SECOND]


def test_the_results_of_an_online_run_are_sorted_by_sending_time(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        "request,sent_s,num_prompt_tokens,num_output_tokens,ttft_ms\n0,1.5,10,1,9\n1,1.0,20,2,9\n2,2.5,30,3,9\n",
    )
    assert shape(trace) == [(0, 20, 2), (SECOND // 2, 10, 1), (3 * SECOND // 2, 30, 3)]
    assert trace.notes == ("rows were sorted by sent_s",)


def test_burstgpt_drops_failures_and_counts_them(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "2,ChatGPT,0,0,0,Conversation log\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "6,GPT-4,100,0,100,API log\n"
        "45.5,GPT-4,1087,230,1317,Conversation log\n",
    )
    assert shape(trace) == [(0, 472, 18), (40_500 * MILLISECOND, 1087, 230)]
    assert trace.notes == ("2 failed requests (0 response tokens) were left out",)


def test_burstgpt_sessions_give_think_time_after_the_whole_response(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path,
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "10,7,4.5,ChatGPT,10,1,11,Conversation log\n"
        "12,,1,GPT-4,20,2,22,API log\n"
        "13,,1,GPT-4,21,2,23,API log\n"
        "20,7,3,ChatGPT,30,0,30,Conversation log\n"
        "40,7,2,ChatGPT,40,4,44,Conversation log\n"
        "41,7,2,ChatGPT,50,5,55,Conversation log\n",
    )
    # The failed turn in between belongs to no one's chain; the last turn came before its reply was whole.
    assert [request.previous for request in trace.requests] == [None, None, None, 0, 3]
    assert [request.gap_ns for request in trace.requests] == [0, 0, 0, 25_500 * MILLISECOND, 0]


def test_mooncake_windows_are_filled_in_order(tmp_path: Path) -> None:
    records = [
        {"timestamp": 3000 * window, "input_length": 600, "output_length": 1 + index, "hash_ids": [0, window]}
        for window in range(20)
        for index in range(10)
    ]
    trace = read_text(tmp_path, json_lines(*records), seed=3)
    arrivals = [request.arrival_ns for request in trace.requests]
    assert arrivals == sorted(arrivals)
    assert [r.num_output_tokens for r in trace.requests] == [r["output_length"] for r in records]
    assert [r.content_ids for r in trace.requests] == [tuple(r["hash_ids"]) for r in records]  # type: ignore[arg-type]
    # The trace begins up to 3 s into the first window, so each arrival is within 3 s of its timestamp.
    offsets = [arrival - 3 * SECOND * (index // 10) for index, arrival in enumerate(arrivals)]
    assert min(offsets) > -3 * SECOND
    assert max(offsets) < 3 * SECOND
    # 200 distinct times where the file has 20.
    assert len(set(arrivals)) == 200
    assert trace.content_block_size == 512
    assert "seed 3" in trace.notes[0]
    assert all(request.previous is None for request in trace.requests)


def test_mooncake_spread_depends_on_the_seed_alone(tmp_path: Path) -> None:
    text = json_lines(*({"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [i]} for i in range(9)))
    assert read_text(tmp_path, text, seed=1) == read_text(tmp_path, text, seed=1)
    assert shape(read_text(tmp_path, text, seed=1)) != shape(read_text(tmp_path, text, seed=2))


def test_mooncake_times_that_are_not_quantised_are_kept(tmp_path: Path) -> None:
    trace = read_text(
        tmp_path, json_lines(*({"timestamp": 7 + t, "input_length": 5, "output_length": 1} for t in (0, 0, 40, 3100)))
    )
    assert [arrival for arrival, _, _ in shape(trace)] == [0, 0, 40 * MILLISECOND, 3100 * MILLISECOND]
    assert trace.notes == ()
    assert trace.content_block_size == 0


def test_qwen_bailian_links_sessions_and_chains_content(tmp_path: Path) -> None:
    common = {"type": "text", "turn": 1}
    trace = read_text(
        tmp_path,
        json_lines(
            {"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 20, "output_length": 30}
            | {"hash_ids": [900, 901]}
            | common,
            {"chat_id": 160, "parent_chat_id": -1, "timestamp": 62, "input_length": 20, "output_length": 5}
            | {"hash_ids": [77, 901]}
            | common,
            {"chat_id": 161, "parent_chat_id": 159, "timestamp": 71.114, "input_length": 40, "output_length": 6}
            | {"hash_ids": [900, 901, 902]}
            | common,
            {"chat_id": 162, "parent_chat_id": 5, "timestamp": 80, "input_length": 3, "output_length": 6}
            | {"hash_ids": [900]}
            | common,
        ),
    )
    assert [request.arrival_ns for request in trace.requests] == [
        0,
        886 * MILLISECOND,
        10_000 * MILLISECOND,
        18_886 * MILLISECOND,
    ]
    assert [request.previous for request in trace.requests] == [None, None, 0, None]
    # 10 s from arrival to arrival, less 100 ms for each of the 30 tokens of the reply.
    assert [request.gap_ns for request in trace.requests] == [0, 0, 7 * SECOND, 0]
    first, second, third, fourth = (request.content_ids for request in trace.requests)
    assert third[:2] == first
    assert fourth == first[:1]
    # Block 901 stands behind another block there, so its content and what precedes it is not the same.
    assert not set(first) & set(second)
    assert trace.content_block_size == 16
    assert "1 turns follow a turn that is not in the file" in trace.notes[0]


def test_the_form_does_not_depend_on_the_file_name(tmp_path: Path) -> None:
    assert shape(read_text(tmp_path, AZURE_2023, name="x.jsonl")) == shape(read_text(tmp_path, AZURE_2023, name="y"))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    assert shape(read_text(tmp_path, "\ufeff" + AZURE_2023)) == shape(read_text(tmp_path, AZURE_2023))


def test_bulk_built_requests_equal_constructed_ones(tmp_path: Path) -> None:
    first = read_text(tmp_path, AZURE_2023).requests[0]
    assert first == TraceRequest(0, 374, 44)
    assert hash(first) == hash(TraceRequest(0, 374, 44))


def test_reading_imports_neither_numpy_nor_pydantic(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE_2023)
    program = (
        "import sys; from traces.reader import read_trace; import traces.catalog, traces.format_statistics, "
        "traces.generators, traces.shaping, traces.writer; read_trace(sys.argv[1], seed=0); "
        "print(sorted({'numpy', 'pydantic', 'simpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- recorded files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_requests", "span_s", "prompt_mean", "output_mean"),
    [
        ("traces/azure2023_code.csv", 8_819, 3_436, 2_048, 27.9),
        ("traces/azure2023_conv.csv", 19_366, 3_502, 1_155, 211),
        # Up to 3 s longer than from first to last timestamp, and up to 3 s shorter.
        ("traces/mooncake_conversation.jsonl", 12_031, 3_537, 12_035, 343),
    ],
)
def test_recorded_traces_have_their_published_figures(
    data_file: Callable[[str], Path],
    name: str,
    num_requests: int,
    span_s: float,
    prompt_mean: float,
    output_mean: float,
) -> None:
    statistics = recorded_statistics(data_file(name))
    assert statistics.num_requests == num_requests
    assert statistics.span_s == pytest.approx(span_s, abs=3)
    # The published means are rounded to their last digit.
    assert statistics.prompt_tokens.mean == pytest.approx(prompt_mean, abs=0.5)
    assert statistics.output_tokens.mean == pytest.approx(output_mean, abs=0.5)


def test_azure_conversation_output_tokens_sum_to_those_of_the_file(data_file: Callable[[str], Path]) -> None:
    path = data_file("traces/azure2023_conv.csv")
    expected = [line.split(",") for line in path.read_text().splitlines()[1:]]
    trace = read_trace(path, seed=0)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests] == [
        (int(prompt), int(output)) for _, prompt, output in expected
    ]


def test_mooncake_conversation_prefix_reuse_is_the_published_one(data_file: Callable[[str], Path]) -> None:
    prefix = recorded_statistics(data_file("traces/mooncake_conversation.jsonl")).prefix
    assert prefix is not None
    assert (prefix.num_distinct_blocks, prefix.num_blocks) == (182_790, 288_500)
    assert prefix.infinite_hit_ratio == pytest.approx(0.366, abs=0.002)
    published = {1_000: 0.045, 3_000: 0.065, 10_000: 0.211, 30_000: 0.326, 50_000: 0.355, 100_000: 0.364}
    for capacity, ratio in prefix.lru_hit_ratios:
        assert ratio == pytest.approx(published[capacity], abs=0.004)


@pytest.mark.parametrize("name", ["online_conv_16", "online_code_6"])
def test_online_runs_are_read(data_file: Callable[[str], Path], name: str) -> None:
    trace = read_trace(data_file(f"h200/vllm-0.22.1_qwen2.5-7b_{name}.csv"), seed=0)
    assert len(trace.requests) == 600


def test_a_large_file_is_read_in_little_time(data_file: Callable[[str], Path]) -> None:
    path = data_file("traces/azure2023_conv.csv")
    durations_s = []
    for _ in range(7):
        start_s = time.process_time()
        read_trace(path, seed=0)
        durations_s.append(time.process_time() - start_s)
    # About 40 ms on an idle core; three times that leaves room for a busy one, and none for a slow reader.
    assert min(durations_s) < 0.12
