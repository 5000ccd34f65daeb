"""ARCHITECTURE.md speaks of files and classes that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sagellm", "sim", "backends", "traces")
BACKTICKED = re.compile(r"`([^`\n]+)`")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CLASS_NAME = re.compile(r"_?[A-Z][A-Za-z]*[a-z][A-Za-z]*")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
FOREIGN_FILES = {"config.json"}  # a model's, not ours
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "docs/design.md",
    "docs/fidelity.md",
    "benchmarks/README.md",
)


def backticked(document: str) -> list[str]:
    text = FENCED.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return BACKTICKED.findall(text)


def is_path(name: str) -> bool:
    """A path of ours has a folder or a suffix that we use, and nothing that only commands and patterns have."""
    if re.search(r"[\s*<>=:()]", name) or name in FOREIGN_FILES:
        return False
    return "/" in name or name.endswith((".py", ".md", ".toml", ".sh"))


def class_names() -> set[str]:
    return {
        node.name
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def test_paths_exist() -> None:
    paths = [name for name in backticked("ARCHITECTURE.md") if is_path(name)]
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_folders_are_written_as_folders() -> None:
    wrong = [
        name
        for name in backticked("ARCHITECTURE.md")
        if is_path(name) and (ROOT / name).is_dir() is not name.endswith("/")
    ]
    assert not wrong


def test_classes_exist() -> None:
    names = [name for name in backticked("ARCHITECTURE.md") if CLASS_NAME.fullmatch(name)]
    assert len(names) > 25
    known = class_names()
    assert not [name for name in names if name not in known]


def test_every_package_has_a_line() -> None:
    named = set(backticked("ARCHITECTURE.md"))
    inner = {f"sagellm/{folder.name}/" for folder in (ROOT / "sagellm").iterdir() if (folder / "__init__.py").exists()}
    assert not sorted((inner | {f"{package}/" for package in PACKAGES if package != "sagellm"}) - named)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = LINK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert not [link for link in links if not ((ROOT / document).parent / link).exists()]
