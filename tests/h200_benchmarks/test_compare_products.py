"""Steps are compared on any backend, with products that give the same logits."""

import json
from pathlib import Path

import pytest
from test_step_table import CONFIG

from benchmarks.h200.compare_products import main


def test_steps_of_both_kinds_are_timed_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out" / "products.json"
    config.write_text(json.dumps(CONFIG))
    words = [str(out), "--backend", "cpu", "--model", str(config), "--rows", "1,5", "--context", "20"]
    assert main(words) == 0
    steps = json.loads(out.read_text())["steps"]
    assert [step["num_rows"] for step in steps] == [1, 5]
    for step in steps:
        assert step["own_ms"] > 0
        assert step["torch_ms"] > 0
        assert step["logits_difference"] < 1e-5
    assert capsys.readouterr().out.count("logits differ") == 2
