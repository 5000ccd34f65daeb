"""A file is there whole, or not at all."""

import os
from pathlib import Path

import pytest

from sim.report.output_file import OutputError, output_errors, replacing


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with replacing(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.suffix == target.suffix
    assert target.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_link_still_points_to_the_file(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_what_is_no_plain_file_is_written_directly() -> None:
    with replacing(Path(os.devnull)) as path:
        assert path == Path(os.devnull)
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("name", ["missing-folder/result.json", ".", "file/result.json"])
def test_an_impossible_target_is_found_on_entering(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write here"), replacing(tmp_path / name):
        pytest.fail("the block must not begin")


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), output_errors(tmp_path / "result.json"):
        raise OSError(28, "No space left on device")
