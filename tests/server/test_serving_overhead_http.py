"""The benchmark of the HTTP side runs as it says, and the server does in small what it must do in large."""

import json
from pathlib import Path

from benchmarks.serving_overhead_http import main


def test_streams_are_served_side_by_side_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    main(["--streams", "40", "--tokens", "400", "--in-a-row", "200", "--json", str(path)])
    streams, in_a_row = json.loads(path.read_text())
    assert streams["tokens_per_s"] > 0
    # None: this machine was so slow that the first ended about when the last began.
    assert streams["progress_of_slowest"] is None or streams["progress_of_slowest"] > 0.5
    assert (in_a_row["num_unfinished"], in_a_row["num_requests_kept"]) == (0, 0)
