"""Stop strings: what goes out ends where the first one begins, and never shows a part of one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.server.openai.stop_strings import StopStrings

_STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def _first_end(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """By looking at ever longer beginnings of the text: where the first complete stop string begins."""
    for length in range(1, len(text) + 1):
        found = [(text[:length].find(stop), -len(stop), stop) for stop in stops if stop in text[:length]]
        if found:
            start, _, stop = min(found)
            return start, stop
    return None


@settings(deadline=None)
@given(text=st.text("abc", max_size=30), stops=_STOPS, with_stop=st.booleans())
def test_text_ends_at_the_stop_string_that_is_complete_first(
    text: str, stops: tuple[str, ...], with_stop: bool
) -> None:
    search, shown, end = StopStrings(stops, with_stop), "", None
    for character in text:
        piece, match = search.push(character)
        shown += piece
        if match is not None:
            end = match.stop
            break
    expected = _first_end(text, stops)
    if expected is None:
        assert end is None
        assert shown + search.flush() == text
    else:
        start, stop = expected
        assert end == stop
        assert shown == text[:start] + (stop if with_stop else "")


@settings(deadline=None)
@given(text=st.text("abc", max_size=30), cuts=st.lists(st.integers(0, 4)), stops=_STOPS)
def test_nothing_is_held_back_without_need(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    search, shown, taken = StopStrings(stops, False), "", 0
    for size in [*cuts, len(text)]:
        piece, match = search.push(text[taken : taken + size])
        shown, taken = shown + piece, min(taken + size, len(text))
        if match is not None:
            return
        held = text[len(shown) : taken]
        assert not held or any(stop.startswith(held) for stop in stops)
