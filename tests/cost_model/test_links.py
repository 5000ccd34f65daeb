"""Transfers: a fixed cost, and bytes over bandwidth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.cost_model.link import LINKS, Link, link_named

MIB = 1 << 20

# KV size in MiB and transfer time in ms: MooncakeConnector, Qwen3-8B, two hosts of 8 H800 with 8 RoCE cards.
# The published sizes are whole blocks of 16 tokens only where MB and GB are read as binary (20 MB: 9 blocks).
MOONCAKE_ROWS = (
    (20, 0.54),
    (38, 0.61),
    (74, 0.92),
    (146, 1.50),
    (290, 2.51),
    (578, 4.75),
    (1.13 * 1024, 8.84),
    (2.25 * 1024, 16.43),
    (4.50 * 1024, 31.65),
)


@pytest.mark.parametrize(("size_mib", "measured_ms"), MOONCAKE_ROWS)
def test_published_mooncake_transfers(size_mib: float, measured_ms: float) -> None:
    predicted_ms = link_named("rdma-8x400").transfer_ns(round(size_mib * MIB)) / 1e6
    assert predicted_ms == pytest.approx(measured_ms, rel=0.06)


@given(st.sampled_from(sorted(LINKS)), st.integers(1, 10**12), st.integers(1, 10**12))
def test_two_transfers_cost_one_fixed_cost_more_than_one(name: str, one: int, two: int) -> None:
    link = LINKS[name]
    together = link.transfer_ns(one + two)
    assert abs(link.transfer_ns(one) + link.transfer_ns(two) - together - link.fixed_ns) <= 2
    assert together >= link.transfer_ns(max(one, two))


def test_no_link_is_faster_than_its_wire() -> None:
    wires_gbps = {
        "nvlink4": 450.0,
        "nvlink3": 300.0,
        "pcie4": 32.0,
        "pcie5": 64.0,
        "rdma-200": 25.0,
        "rdma-400": 50.0,
        "rdma-8x200": 200.0,
        "rdma-8x400": 400.0,
        "tcp-100": 12.5,
    }
    assert set(wires_gbps) == set(LINKS)
    for name, wire_gbps in wires_gbps.items():
        assert LINKS[name].gbps < wire_gbps


def test_links_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="'carrier-pigeon' is not known; must be one of nvlink4"):
        link_named("carrier-pigeon")
    with pytest.raises(ValueError, match=r"gbps 0\.0 \(above 0\)"):
        Link("dead", 0, 0.0, "estimate", "")
    with pytest.raises(ValueError, match="num_bytes: -1"):
        link_named("nvlink4").transfer_ns(-1)
    assert link_named("nvlink4").transfer_ns(0) == 0
