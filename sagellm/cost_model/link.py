"""What it takes to move bytes: a fixed cost, then bytes over bandwidth.

Pure: concurrent transfers that share a link are the simulator's business.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """One way between two instances. ``gbps`` is gigabytes (1e9) a second that a single transfer reaches."""

    name: str
    fixed_ns: int
    gbps: float
    status: str  # measured, spec or estimate
    source: str

    def __post_init__(self) -> None:
        if self.fixed_ns < 0 or self.gbps <= 0:
            raise ValueError(f"link {self.name}: fixed_ns is {self.fixed_ns} (0 or more), gbps {self.gbps} (above 0)")

    def transfer_ns(self, num_bytes: int) -> int:
        """Nanoseconds for ``num_bytes`` with the link to itself; nothing to move takes no time."""
        if num_bytes < 0:
            raise ValueError(f"num_bytes: {num_bytes}, must be 0 or more")
        if num_bytes == 0:
            return 0
        return self.fixed_ns + round(num_bytes / self.gbps)


_SHEET = "line rate as specified; fixed cost 10 us and 0.8 of the line rate are assumptions"
_MOONCAKE = (
    "smallest largest relative error (5.7 %) over the nine published MooncakeConnector transfers "
    "(Qwen3-8B, two hosts of 8 H800 with 8 ConnectX-7 over RoCE, vLLM 0.11.2; sizes there are binary)"
)


def _sheet_link(name: str, line_rate_gbps: float) -> Link:
    return Link(name, 10_000, line_rate_gbps * 0.8, "spec", _SHEET)


LINKS = {
    link.name: link
    for link in (
        _sheet_link("nvlink4", 450.0),
        _sheet_link("nvlink3", 300.0),
        _sheet_link("pcie4", 32.0),
        _sheet_link("pcie5", 64.0),
        _sheet_link("rdma-200", 25.0),
        _sheet_link("rdma-400", 50.0),
        _sheet_link("rdma-8x200", 8 * 25.0),
        Link("rdma-8x400", 370_000, 146.5, "measured", _MOONCAKE),
        Link("tcp-100", 50_000, 12.5 * 0.8, "estimate", "100 Gb/s; 50 us fixed and 0.8 of the line rate are assumed"),
    )
}
"""Links by name. ``rdma-N`` is one network card of N Gb/s, ``rdma-8xN`` eight of them used together."""


def link_named(name: str) -> Link:
    """Raises ``ValueError``, naming those that there are, where there is no such link."""
    link = LINKS.get(name)
    if link is None:
        raise ValueError(f"link: {name!r} is not known; must be one of {', '.join(LINKS)}")
    return link
