"""Amounts with units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.cluster.quantities import parse_bandwidth_bytes_per_s, parse_duration_ns, parse_slo
from sagellm.core.request import LatencySLO


@given(st.integers(1, 10**9), st.sampled_from([("ns", 1), ("us", 10**3), ("ms", 10**6), ("s", 10**9)]))
def test_a_whole_number_of_units_is_exact(number: int, unit: tuple[str, int]) -> None:
    name, unit_ns = unit
    assert parse_duration_ns(f"{number}{name}") == parse_duration_ns(f" {number} {name} ") == number * unit_ns


def test_fractions_are_exact_where_floats_are_not() -> None:
    assert parse_duration_ns("0.29s") == 290_000_000
    assert parse_duration_ns("2.3ms") == 2_300_000


@pytest.mark.parametrize("text", ["500", "ms", "", "-5ms", "5 minutes", "1e3ms", "0ms", "0.1ns", "5ms5", "nan s"])
def test_no_duration_without_a_unit_or_at_zero(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a duration|more than zero"):
        parse_duration_ns(text)


def test_bits_and_bytes() -> None:
    assert parse_bandwidth_bytes_per_s("400Gb/s") == parse_bandwidth_bytes_per_s("50GB/s") == 50 * 10**9
    for text in ("400", "400Gbps", "0Gb/s", "-1GB/s"):
        with pytest.raises(ValueError, match=r"not a bandwidth|more than zero"):
            parse_bandwidth_bytes_per_s(text)


def test_slo_limits() -> None:
    assert parse_slo("ttft=500ms,tpot=50ms") == parse_slo("tpot=50ms, ttft=0.5s") == LatencySLO(500_000_000, 50_000_000)
    assert parse_slo("tpot=1s") == LatencySLO(None, 1_000_000_000)
    for text in ("", "ttft", "ttft=", "e2el=1s", "ttft=1s,ttft=2s", "ttft=1s,"):
        with pytest.raises(ValueError, match=r"limit|duration|twice"):
            parse_slo(text)
