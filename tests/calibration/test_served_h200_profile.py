"""The shipped profile of our own server on an H200 says what that server did. Figures: docs/h200.md."""

from pathlib import Path

import pytest

from sagellm.cluster.build import build_cluster
from sagellm.cluster.reading import read_cluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.reader import read_trace

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "h200"


@pytest.mark.parametrize(
    ("load", "ttft_ms", "tpot_ms", "output_tokens_per_s"),
    [
        # Median and p90 of TTFT and of TPOT; medians of three runs. The fit has seen the first load only.
        ("conv_16", (30.8, 95.7), (7.26, 8.89), 3979),
        ("code_6", (1779, 6357), (50.6, 52.2), 157),
    ],
)
def test_the_named_cluster_predicts_its_server(
    load: str, ttft_ms: tuple[float, float], tpot_ms: tuple[float, float], output_tokens_per_s: float
) -> None:
    path = DATA / f"vllm-0.22.1_qwen2.5-7b_online_{load}.csv"
    if not path.exists():
        pytest.skip(f"arrivals and lengths are not at hand: ../shared/data/h200/{path.name}")
    cluster = sim_cluster(build_cluster(read_cluster("h200x1-sagellm")))
    summary = summarise(replay(cluster, read_trace(path, seed=0)).metrics, {})
    assert summary.ttft is not None
    assert summary.tpot is not None
    assert (summary.ttft.median_ms, summary.ttft.p90_ms) == pytest.approx(ttft_ms, rel=0.07)
    assert (summary.tpot.median_ms, summary.tpot.p90_ms) == pytest.approx(tpot_ms, rel=0.04)
    assert summary.output_throughput == pytest.approx(output_tokens_per_s, rel=0.01)
