"""Amounts with their units, as people write them: ``500ms``, ``400Gb/s``, ``ttft=500ms,tpot=50ms``."""

import re
from fractions import Fraction

from sagellm.core.request import LatencySLO

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s)")
_NS_PER_UNIT = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}

_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(b|B)/s")
_PER_SECOND = {"M": 10**6, "G": 10**9, "T": 10**12}

SLO_LIMITS = ("ttft", "tpot")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of a duration such as ``500ms``; the unit is ns, us, ms or s and is never left out.

    Raises:
        ValueError: it is not a duration, or is shorter than a nanosecond.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and its unit (ns, us, ms or s), such as 500ms")
    duration_ns = int(Fraction(match[1]) * _NS_PER_UNIT[match[2]])
    if duration_ns < 1:
        raise ValueError(f"{text!r} must be more than zero")
    return duration_ns


def parse_bandwidth_bytes_per_s(text: str) -> int:
    """Bytes per second of a bandwidth such as ``400Gb/s`` (bits) or ``50GB/s`` (bytes); decimal prefixes.

    Raises:
        ValueError: it is not a bandwidth, or is below a byte per second.
    """
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a bandwidth; write 400Gb/s for bits or 50GB/s for bytes (M, G or T)")
    bits_per_symbol = 8 if match[3] == "B" else 1
    bytes_per_s = int(Fraction(match[1]) * _PER_SECOND[match[2]] * bits_per_symbol / 8)
    if bytes_per_s < 1:
        raise ValueError(f"{text!r} must be more than zero")
    return bytes_per_s


def parse_slo(text: str) -> LatencySLO:
    """The limits in ``ttft=500ms,tpot=50ms``; either may be left out, not both.

    Raises:
        ValueError: an unknown or repeated limit, or something that is not a duration.
    """
    limits_ns: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in SLO_LIMITS:
            raise ValueError(f"{part.strip()!r} is not a limit; write ttft=500ms, tpot=50ms or both with a comma")
        if name in limits_ns:
            raise ValueError(f"{name} is given twice")
        limits_ns[name] = parse_duration_ns(value)
    return LatencySLO(ttft_ns=limits_ns.get("ttft"), tpot_ns=limits_ns.get("tpot"))
