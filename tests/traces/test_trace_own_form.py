"""What is written in our own form comes back equal, and no half-written file is ever left."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.reader import read_trace
from traces.request_trace import Trace, TraceRequest
from traces.writer import write_trace


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any valid trace."""
    block_size = draw(st.sampled_from([0, 1, 16, 512]))
    arrivals = sorted(draw(st.lists(st.integers(0, 1 << 62), min_size=1, max_size=20)))
    requests = []
    for index, arrival_ns in enumerate(arrivals):
        num_prompt_tokens = draw(st.integers(1, 40 if block_size == 1 else 3000))
        num_blocks = -(-num_prompt_tokens // block_size) if block_size else 0
        first_id = draw(st.integers(-(1 << 63), 1 << 64))
        requests.append(
            TraceRequest(
                arrival_ns=arrival_ns,
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=draw(st.integers(1, 1 << 40)),
                content_ids=tuple(range(first_id, first_id + num_blocks)) if draw(st.booleans()) else (),
                priority=draw(st.integers(-5, 5)),
                previous=draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None,
                gap_ns=draw(st.integers(0, 1 << 62)),
            )
        )
    text = st.text(st.characters(), max_size=20)
    return Trace(
        name=draw(text),
        requests=tuple(requests),
        content_block_size=block_size,
        source=draw(text),
        notes=tuple(draw(st.lists(text, max_size=3))),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces())
def test_a_written_trace_reads_back_equal(tmp_path: Path, trace: Trace) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(trace, path)
    assert read_trace(path, seed=0) == trace
    assert os.listdir(tmp_path) == ["trace.jsonl"]


ONE = Trace("one", (TraceRequest(0, 1, 1),))


def test_a_trace_that_cannot_be_encoded_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("old")
    broken = Trace("broken", (TraceRequest(0, 1, 1, priority=object()),))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_trace(broken, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["trace.jsonl"]


def test_a_failing_move_leaves_neither_a_new_nor_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TraceError, match=r"trace\.jsonl: the file cannot be written: No space left"):
        write_trace(ONE, tmp_path / "trace.jsonl")
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written: No such file or directory"):
        write_trace(ONE, tmp_path / "absent" / "trace.jsonl")
    with pytest.raises(TraceError, match="is a directory"):
        write_trace(ONE, tmp_path)
    with pytest.raises(TraceError, match="no requests"):
        write_trace(Trace("none", ()), tmp_path / "trace.jsonl")
    assert os.listdir(tmp_path) == []


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    write_trace(ONE, tmp_path / "trace.jsonl")
    assert (tmp_path / "trace.jsonl").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
