"""What is loaded when, in processes of their own."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "aiohttp", "simpy", "numpy", "pydantic", "yaml")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that are loaded after ``statement``, run in a new process."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(finished.stdout.split())


@pytest.mark.parametrize("statement", ["import sagellm", "import sagellm.cli"])
def test_nothing_heavy_is_loaded_before_it_is_needed(statement: str) -> None:
    assert not loaded_after(statement).intersection(HEAVY)


def test_the_measure_sees_what_is_loaded() -> None:
    assert "yaml" in loaded_after("import yaml")


def test_the_packages_of_the_design_note_are_attributes() -> None:
    loaded = loaded_after(
        "from sagellm import backends, runtime\n"
        "import backends as top_level\n"
        "assert backends is top_level\n"
        "import sagellm\n"
        "assert sagellm.runtime is runtime"
    )
    assert "torch" not in loaded


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import sagellm

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sagellm.nonsense  # noqa: B018
