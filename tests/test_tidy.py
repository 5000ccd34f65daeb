"""The repository checks itself for what no linter of ours knows."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sagellm", "sim", "backends", "traces")
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 400

UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
# Absolute paths that exist on somebody's machine only.
MACHINE_PATH = re.compile(r"(?<![\w.~$-])/(?:ho" + r"me|wo" + r"rk|ro" + r"ot|Us" + r"ers|m" + r"nt)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".html", ".css", ".js", ".cfg", ".sh", ""}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def project_files() -> list[Path]:
    """What git tracks, or would if it were added; everything but data and pictures."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is not a git checkout, so what belongs to the project is not known: {error}")
    paths = (ROOT / name for name in listed.stdout.splitlines())
    return [path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_files_to_check() -> None:
    assert len(python_files(*PACKAGES)) > 20


def test_functions_fit_on_a_screen() -> None:
    too_long = [
        f"{name_of(path)}:{function.lineno} {function.name}: {function.end_lineno - function.lineno + 1} lines"
        for path in python_files(*PACKAGES, "tests", "benchmarks")
        for function in functions(path)
        if function.end_lineno is not None and function.end_lineno - function.lineno >= FUNCTION_LINES_MAX
    ]
    assert not too_long


def test_files_hold_one_idea() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*PACKAGES)}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES_MAX}


def test_nothing_is_left_for_later() -> None:
    found = [
        f"{name_of(path)}:{token.start[0]}: {token.string}"
        for path in python_files(*PACKAGES, "tests", "benchmarks")
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.COMMENT and UNFINISHED.search(token.string)
    ]
    assert not found


def test_no_handler_swallows_every_error() -> None:
    broad = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _raises_again(node)
    ]
    assert not broad


def _is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Cleaning up and passing the same error on is no swallowing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [name_of(path) for path in python_files(*PACKAGES) if path.stem in drawers]


def test_no_path_of_one_machine() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


def test_decisions_do_not_iterate_sets() -> None:
    """Sets of strings iterate in an order that differs from process to process."""
    deciding = ("core", "control_plane", "runtime", "kv_runtime", "kv_policy", "prefix_reuse", "cost_model")
    found = [
        f"{name_of(path)}:{loop.lineno}"
        for path in python_files(*(f"sagellm/{package}" for package in deciding))
        for loop in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(loop, ast.For) and _is_set(loop.iter)
    ]
    assert not found


def _is_set(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in {"set", "frozenset"}
    return isinstance(node, ast.Set | ast.SetComp)
