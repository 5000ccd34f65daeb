"""Times in text, as integer nanoseconds."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import cast

NANOSECONDS_PER_SECOND = 1_000_000_000
_ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$", re.ASCII)
_SECOND = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", re.ASCII)
_FRACTION = re.compile(r"\.(\d{1,9})|", re.ASCII)
_DIGITS_TO_ZERO = str.maketrans("123456789", "000000000")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def clock_column_ns(column: Sequence[str]) -> list[int | None]:
    """Dates with times of day (``2023-11-16 18:15:46.6805900``, a zone may follow) in nanoseconds.

    Up to nine fractional digits are kept, exactly. None stands where a text is no such time.
    """
    num_digits = len(column[0]) - 20
    shape = "0000-00-00 00:00:00." + "0" * num_digits
    # All of one shape, as in the 2023 traces: one comparison checks the whole column.
    if 1 <= num_digits <= 9 and "".join(column).translate(_DIGITS_TO_ZERO) == shape * len(column):
        # Keyed by all but the last digit of the second, so that a second of 60 or more is found out as well.
        tens_ns = {tens: _second_ns(tens + "0") for tens in {text[:18] for text in column}}
        if None not in tens_ns.values():
            known_ns = cast("dict[str, int]", tens_ns)
            scale = 10 ** (9 - num_digits)
            return [known_ns[text[:18]] + int(text[18] + text[20:]) * scale for text in column]
    second_ns = {second: _second_ns(second) for second in {text[:19] for text in column}}
    return [_with_rest_ns(second_ns[text[:19]], text[19:]) for text in column]


def _second_ns(text: str) -> int | None:
    """Nanoseconds from 1970 of a whole second, without a zone."""
    if not _SECOND.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        return None
    return (moment - _EPOCH) // timedelta(seconds=1) * NANOSECONDS_PER_SECOND


def _with_rest_ns(base_ns: int | None, rest: str) -> int | None:
    """Add what follows the whole second: a fraction, a zone, or both; None where it is neither."""
    if base_ns is None:
        return None
    zone = _ZONE.search(rest)
    offset_ns = 0
    if zone:
        rest = rest[: zone.start()]
        digits = zone.group().replace(":", "")
        if digits != "Z":
            sign = -1 if digits[0] == "-" else 1
            offset_ns = sign * (int(digits[1:3]) * 3600 + int(digits[3:5]) * 60) * NANOSECONDS_PER_SECOND
    fraction = _FRACTION.fullmatch(rest)
    if fraction is None:
        return None
    return base_ns - offset_ns + int((fraction.group(1) or "0").ljust(9, "0"))


def seconds_ns(text: str) -> int | None:
    """A decimal number of seconds, 0 or more, in nanoseconds; None where the text is no such number."""
    try:
        seconds = Decimal(text)
    except InvalidOperation:
        return None
    # A timestamp of more than 10^9 seconds is a date since 1970, which is fine; 10^12 and more are not seconds.
    if not seconds.is_finite() or not 0 <= seconds < 10**12 or "_" in text:
        return None
    return int(seconds.scaleb(9).to_integral_value())
