"""Events come out whole, however their bytes arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.load_client import event_stream
from sagellm.load_client.event_stream import EventStreamParser, MalformedStreamError

DATA = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).map(str.strip).filter(bool)
NOISE = st.sampled_from([":keep-alive", ":", "event: token", "id: 7", "retry: 10", ":data: no"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream and the data of its events, each of one or more lines, with what is passed over in between."""
    events = draw(st.lists(st.lists(DATA, min_size=1, max_size=3), max_size=8))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    colon = draw(st.sampled_from(["data:", "data: "]))
    text = ""
    for lines in events:
        if draw(st.booleans()):
            text += draw(NOISE) + end + (end if draw(st.booleans()) else "")
        text += "".join(f"{colon}{line}{end}" for line in lines) + end
    return text.encode(), ["\n".join(lines).encode() for lines in events]


@given(stream=streams(), data=st.data())
def test_events_do_not_depend_on_how_the_bytes_arrive(stream: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    text, expected = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parser = EventStreamParser()
    parts = zip([0, *cuts], [*cuts, len(text)], strict=True)
    assert [event for start, end in parts for event in parser.feed(text[start:end])] == [
        b"\n".join(line.strip() for line in event.split(b"\n")) for event in expected
    ]


def test_an_event_that_is_not_complete_is_kept_back() -> None:
    parser = EventStreamParser()
    assert parser.feed(b"data: half") == []
    assert parser.feed(b" and half\n") == []
    assert parser.feed(b"\n") == [b"half and half"]


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "BUFFER_BYTES_MAX", 100)
    parser = EventStreamParser()
    parser.feed(b"data: " + b"x" * 50)
    with pytest.raises(MalformedStreamError, match="an event of more than"):
        parser.feed(b"x" * 50)
