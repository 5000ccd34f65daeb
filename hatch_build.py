"""Compiles the hot modules with mypyc when the package is built or installed.

The same Python files run compiled or interpreted, with the same results; compiled they are about
twice as fast. Where there is no C compiler, or with ``SAGELLM_PURE=1``, they stay interpreted.
"""

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STAMP = Path(".compiled-sources.sha256")
"""Beside modules compiled in place: what they were compiled from, as ``sha256sum`` writes and checks it."""


def stamp_text(root: Path, modules: list[str]) -> str:
    """A line for each compiled module's source, after one for the Python that they were compiled for."""
    lines = [f"{hashlib.sha256((root / module).read_bytes()).hexdigest()}  {module}\n" for module in modules]
    return "".join((f"# {sys.version.splitlines()[0]}\n", *lines))


class CompileHotModules(BuildHookInterface):  # type: ignore[type-arg]
    """In a wheel the compiled modules lie beside their sources; an editable install puts them into the tree."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root, modules = Path(self.root), self.config["modules"]
        if self.target_name != "wheel" or os.environ.get("SAGELLM_PURE") == "1":
            return
        in_place = version == "editable"
        if in_place and _is_compiled(root, modules):
            return
        _remove_compiled(root)
        with tempfile.TemporaryDirectory() as work:
            try:
                compiled = _compile(root, modules, Path(work))
            except (ImportError, OSError, SystemExit, RuntimeError) as error:
                self.app.display_warning(f"not compiled, so replays take about twice as long: {error}")
                return
            if in_place:
                for path in compiled:
                    shutil.copy2(path, root / path.relative_to(Path(work) / "lib"))
                (root / STAMP).write_text(stamp_text(root, modules))
                return
            kept = Path(self.directory) / "compiled"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(Path(work) / "lib", kept)
        for path in kept.rglob("*" + _suffix()):
            build_data["force_include"][str(path)] = str(path.relative_to(kept))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def _is_compiled(root: Path, modules: list[str]) -> bool:
    stamp = root / STAMP
    if not stamp.is_file() or stamp.read_text() != stamp_text(root, modules):
        return False
    return all((root / module).with_suffix(_suffix()).is_file() for module in modules)


def _remove_compiled(root: Path) -> None:
    (root / STAMP).unlink(missing_ok=True)
    for folder in ("sagellm", "sim"):
        for path in (root / folder).rglob("*" + _suffix()):
            path.unlink()
    for path in root.glob("*__mypyc*" + _suffix()):
        path.unlink()


def _compile(root: Path, modules: list[str], work: Path) -> list[Path]:
    """Raises where a tool is missing or something does not compile."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.errors import BaseError, CompileError, LinkError

    before = Path.cwd()
    os.chdir(root)
    try:
        options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        extensions = mypycify(
            [*options, *modules], opt_level="2", target_dir=str(work / "c"), include_runtime_files=True
        )
        if os.name == "posix":
            for extension in extensions:
                # Compiled modules call each other directly, not through a table that others could change.
                extension.extra_compile_args.append("-fvisibility=hidden")
        command = Distribution({"name": "sagellm", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(work / "lib"), str(work / "o")
        command.parallel = os.cpu_count()
        command.ensure_finalized()
        command.run()
    except (BaseError, CompileError, LinkError) as error:
        # The last two, of a compiler that fails or is not there, are not of the first one's family.
        raise RuntimeError(str(error)) from error
    finally:
        os.chdir(before)
    return list((work / "lib").rglob("*" + _suffix()))
