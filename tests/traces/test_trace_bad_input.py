"""Whatever is wrong with a file ends in one sentence that says where, what, and what would be right."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.reader import read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PLAIN = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
ONLINE = "request,sent_s,num_prompt_tokens,num_output_tokens\n"
NOON = "2023-11-16 12:00:00.0000000"
MOONCAKE = {"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": [1]}
QWEN = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 5, "output_length": 6, "hash_ids": [1]}
HEADER = {"format": "sagellm-trace", "schema": 1, "name": "t", "content_block_size": 16, "source": "", "notes": []}
OWN = {"arrival_ns": 0, "num_prompt_tokens": 5, "num_output_tokens": 6}


def lines(*records: dict[str, object]) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n"


def without(record: dict[str, object], field: str) -> dict[str, object]:
    return {name: value for name, value in record.items() if name != field}


CASES = {
    # text, then what the message must hold
    "negative length": (AZURE + f"{NOON},5,6\n{NOON},-5,6\n", ["line 3", "ContextTokens", "'-5'", "1 or more"]),
    "zero prompt": (PLAIN + "0,0,6\n", ["line 2", "num_prefill_tokens", "'0'", "1 or more"]),
    "zero output": (AZURE + f"{NOON},5,0\n", ["line 2", "GeneratedTokens", "'0'", "1 or more"]),
    "text for a number": (PLAIN + "0,5,6\n1,many,6\n", ["line 3", "num_prefill_tokens", "'many'", "whole number"]),
    "fraction of a token": (PLAIN + "0,5,6.5\n", ["line 2", "num_decode_tokens", "'6.5'", "whole number"]),
    "underscore in a number": (PLAIN + "0,1_0,6\n", ["line 2", "num_prefill_tokens", "'1_0'"]),
    "digits of another script": (PLAIN + "0,\u0665,6\n", ["line 2", "num_prefill_tokens", "whole number"]),
    "missing number": (AZURE + f"{NOON},5,\n", ["line 2", "GeneratedTokens", "missing"]),
    "unsorted Azure": (
        AZURE + f"{NOON},5,6\n2023-11-16 11:59:59.9999999,5,6\n",
        ["line 3", "TIMESTAMP", "11:59:59", NOON, "sort"],
    ),
    "unsorted plain": (PLAIN + "2,5,6\n\n1,5,6\n", ["line 4", "arrived_at", "'1'", "'2'", "sort"]),
    "unsorted BurstGPT": (BURST + "2,G,5,6,11,A\n1,G,5,6,11,A\n", ["line 3", "Timestamp", "sort"]),
    "unsorted Mooncake": (lines(MOONCAKE | {"timestamp": 9}, MOONCAKE), ["line 2", "timestamp", "sort"]),
    "unsorted Qwen": (lines(QWEN, QWEN | {"chat_id": 2, "timestamp": 0.25}), ["line 2", "timestamp", "sort"]),
    "missing timestamp": (AZURE + ",5,6\n", ["line 2", "TIMESTAMP", "missing"]),
    "no such timestamp": (AZURE + "2023-02-30 12:00:00.0000000,5,6\n", ["line 2", "TIMESTAMP", "2023-02-30"]),
    "second of 99": (AZURE + "2023-11-16 12:00:99.0000000,5,6\n", ["line 2", "TIMESTAMP", "12:00:99"]),
    "ten fractional digits": (AZURE + f"{NOON}000,5,6\n", ["line 2", "TIMESTAMP"]),
    "time as text": (PLAIN + "noon,5,6\n", ["line 2", "arrived_at", "'noon'", "seconds"]),
    "time not a number": (PLAIN + "nan,5,6\n", ["line 2", "arrived_at", "'nan'", "seconds"]),
    "negative time": (ONLINE + "0,-1,5,6\n", ["line 2", "sent_s", "'-1'", "0 or more"]),
    "no time column": (
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n5,6,11,1\n",
        ["arrived_at is missing", "must have it"],
    ),
    "unknown columns": ("when,what\n1,2\n", ["when,what", "TIMESTAMP", "arrived_at", "Timestamp", "Mooncake"]),
    "no header": (f"{NOON},5,6\n", ["no known trace", "TIMESTAMP,ContextTokens,GeneratedTokens"]),
    "column twice": (PLAIN.strip() + ",arrived_at\n0,5,6,1\n", ["twice"]),
    "too few values": (AZURE + f"{NOON},5,6\n{NOON},5\n", ["line 3", "2 values", "must have 3"]),
    "too many values": (AZURE + f"{NOON},5,6,7\n", ["line 2", "4 values", "must have 3"]),
    "open quotation": (PLAIN + '0,"5,6\n', ["line 2", "quotation"]),
    "quotation in the header": (AZURE.replace("TIMESTAMP", 'TIMESTAMP"') + f"{NOON},5,6\n", ["TIMESTAMP"]),
    "header only": (AZURE, ["no request"]),
    "all failures": (BURST + "1,G,5,0,5,A\n", ["line 2", "Response tokens", "all rows are failures"]),
    "response to nothing": (BURST + "1,G,0,5,5,A\n", ["line 2", "Request tokens"]),
    "empty": ("", ["empty", "TIMESTAMP"]),
    "blank": ("\n  \n", ["empty"]),
    "truncated line": (lines(MOONCAKE, MOONCAKE)[:-20], ["line 2", "not a whole JSON object", "cut off"]),
    "first line truncated": ('{"timestamp": 0, "inp', ["line 1", "not a whole JSON object"]),
    "no object": (lines(MOONCAKE) + "[1, 2]\n", ["line 2", "[1, 2]", "not a JSON object"]),
    "unknown fields": (lines({"a": 1}), ["'a'", "Mooncake"]),
    "Mooncake negative": (lines(MOONCAKE | {"input_length": -5}), ["line 1", "input_length", "-5", "1 or more"]),
    "Mooncake no output": (lines(MOONCAKE, MOONCAKE | {"output_length": 0}), ["line 2", "output_length", "0"]),
    "Mooncake text": (lines(MOONCAKE | {"output_length": "6"}), ["line 1", "output_length", "'6'", "whole number"]),
    "Mooncake truth value": (lines(MOONCAKE | {"output_length": True}), ["line 1", "output_length", "True"]),
    "Mooncake without time": (lines(MOONCAKE, without(MOONCAKE, "timestamp")), ["line 2", "timestamp", "missing"]),
    "Mooncake ids": (lines(MOONCAKE | {"hash_ids": [1, "x"]}), ["line 1", "hash_ids", "list of whole numbers"]),
    "Mooncake id count": (lines(MOONCAKE | {"input_length": 513}), ["line 1", "hash_ids", "1 ids", "must have 2"]),
    "Qwen time": (lines(QWEN | {"timestamp": "x"}), ["line 1", "timestamp", "'x'", "seconds"]),
    "Qwen id twice": (lines(QWEN, QWEN), ["line 2", "chat_id", "line 1"]),
    "own schema": (lines(HEADER | {"schema": 2}, OWN), ["line 1", "schema is 2", "must be 1"]),
    "own format": (lines(HEADER | {"format": "x"}, OWN), ["line 1", "format", "'sagellm-trace'"]),
    "own header type": (lines(HEADER | {"name": 5}, OWN), ["line 1", "name is 5", "str"]),
    "own without requests": (lines(HEADER), ["no request"]),
    "own cut off": (lines(HEADER | {"num_requests": 2}, OWN), ["1 requests", "num_requests is 2", "cut off"]),
    "own unsorted": (lines(HEADER, OWN | {"arrival_ns": 9}, OWN), ["line 3", "arrival_ns is 0", "sort"]),
    "own unknown field": (lines(HEADER, OWN | {"prio": 1}), ["line 2", "'prio'", "priority"]),
    "own previous ahead": (lines(HEADER, OWN, OWN | {"previous": 1}), ["line 3", "previous is 1", "0 to 0"]),
    "own zero output": (lines(HEADER, OWN | {"num_output_tokens": 0}), ["line 2", "num_output_tokens is 0"]),
    "own negative gap": (lines(HEADER, OWN | {"gap_ns": -1}), ["line 2", "gap_ns is -1", "0 or more"]),
    "own priority": (lines(HEADER, OWN | {"priority": "high"}), ["line 2", "priority is 'high'"]),
    "own content": (lines(HEADER | {"content_block_size": 0}, OWN | {"content_ids": [1]}), ["line 2", "content_ids"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(tmp_path: Path, case: str) -> None:
    text, expected = CASES[case]
    path = tmp_path / "bad.data"
    path.write_bytes(text.encode())
    with pytest.raises(TraceError) as caught:
        read_trace(path, seed=0)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 700
    for part in expected:
        assert part in message


def test_undecodable_bytes_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(AZURE.encode() + b"2023-11-16 12:00:00,5,6\n\xff\xfe\n")
    with pytest.raises(TraceError, match=r"line 3: byte 0xff is not UTF-8"):
        read_trace(path, seed=0)


def test_a_missing_file_a_directory_and_an_impossible_name(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "absent.csv", seed=0)
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path, seed=0)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace("a\0b", seed=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(AZURE)
    path.chmod(0)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path, seed=0)


VALID = (
    AZURE + f"{NOON},5,6\n{NOON},7,8\n",
    PLAIN + "0,5,6\n1,7,8\n",
    BURST + "0,G,5,6,11,A\n1,G,7,8,15,A\n",
    lines(MOONCAKE, MOONCAKE | {"timestamp": 9}),
    lines(QWEN, QWEN | {"chat_id": 2, "parent_chat_id": 1}),
    lines(HEADER, OWN | {"content_ids": [3]}, OWN | {"previous": 0, "gap_ns": 5}),
)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.sampled_from(VALID),
    place=st.floats(0, 1),
    num_removed=st.integers(0, 30),
    inserted=st.one_of(
        st.text(max_size=4),
        st.sampled_from(["-", "NaN", "1e999", "null", "[]", "{}", '"', ",", "\n", "\r", "\x85", "[" * 9999]),
    ),
)
def test_no_damage_ends_in_anything_but_a_trace_or_a_trace_error(
    tmp_path: Path, text: str, place: float, num_removed: int, inserted: str
) -> None:
    start = int(place * len(text))
    path = tmp_path / "damaged"
    path.write_bytes((text[:start] + inserted + text[start + num_removed :]).encode("utf-8", "surrogatepass"))
    try:
        trace = read_trace(path, seed=0)
    except TraceError:
        return
    assert trace.requests
    assert all(r.num_prompt_tokens >= 1 and r.num_output_tokens >= 1 and r.gap_ns >= 0 for r in trace.requests)
    arrivals = [request.arrival_ns for request in trace.requests]
    assert arrivals == sorted(arrivals)
    assert all(r.previous is None or 0 <= r.previous < index for index, r in enumerate(trace.requests))
