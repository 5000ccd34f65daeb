"""Profiles as files: all shipped ones hold what they must, and broken ones are named."""

import json
from pathlib import Path

import pytest

from backends.profile_files import list_profiles, load_profile, read_profile
from sagellm.cost_model.factory import describe_profile, make_step_cost_model, steps_in_flight_max
from sagellm.cost_model.profile import AnalyticProfile, FittedProfile
from sagellm.models.known_models import load_model
from sim.calibration.profile_writer import profile_json, write_profile

NEEDED = {"h200", "h100", "a100", "l40s", "h20", "ascend-910b2", "ascend-910c", "mlu370-x8", "bw1000"}


def test_every_needed_device_has_a_sheet() -> None:
    names = list_profiles()
    assert {f"{device}/spec" for device in NEEDED} <= set(names)
    assert {"h200/vllm-0.22.1", "h200/vllm-0.22.1-qwen2.5-7b"} <= set(names)


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profiles_say_where_they_come_from(name: str) -> None:
    profile = load_profile(name)
    header = profile.header
    assert header.name == name
    assert header.source
    assert header.engine
    if header.status == "measured":
        assert "median" in header.fit_error
    else:
        assert any("assumption" in note for note in header.notes)


@pytest.mark.parametrize("name", list_profiles())
def test_writing_and_reading_gives_the_same_profile(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    path = tmp_path / "copy.json"
    write_profile(profile, path)
    assert read_profile(path) == profile
    assert load_profile(str(path)) == profile


def test_a_fitted_profile_refuses_another_model() -> None:
    profile = load_profile("h200/vllm-0.22.1-qwen2.5-7b")
    assert isinstance(profile, FittedProfile)
    make_step_cost_model(profile, load_model("Qwen/Qwen2.5-7B-Instruct"))
    for model, tp in (("Qwen/Qwen3-8B", 1), ("Qwen/Qwen2.5-7B", 2)):
        with pytest.raises(ValueError, match=r"was fitted to Qwen/Qwen2\.5-7B at tp 1"):
            make_step_cost_model(profile, load_model(model), tp)


def test_the_description_carries_the_status() -> None:
    profile = load_profile("ascend-910b2/spec")
    text = describe_profile(profile, load_model("Qwen/Qwen3-8B"), 2)
    assert "ascend-910b2/spec (estimate, analytic): Qwen/Qwen3-8B on 2 x Ascend 910B2" in text
    assert steps_in_flight_max(profile) == 1
    assert steps_in_flight_max(load_profile("h200/vllm-0.22.1")) == 2


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match="'h300/spec' is not known; must be one of a100/spec"):
        load_profile("h300/spec")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "guessed"}, "kind"),
        ({"surplus": 1}, "surplus: Extra inputs are not permitted"),
        ({"device": {"memory_bytes": -1}}, "device.memory_bytes"),
        ({"schema": 2}, "schema"),
    ],
)
def test_broken_files_name_file_and_field(change: dict[str, object], words: str, tmp_path: Path) -> None:
    profile = load_profile("h200/spec")
    assert isinstance(profile, AnalyticProfile)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**profile_json(profile), **change}))
    with pytest.raises(ValueError, match=r"broken\.json") as caught:
        read_profile(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('{"schema": 1,\n "kind"')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_profile(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(str(tmp_path / "none.json"))
