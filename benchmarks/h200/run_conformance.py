"""Conformance of the CUDA backend and times of its operator kernels: one command, a table and JSON files.

    python benchmarks/h200/run_conformance.py OUT_FOLDER [--skip-conformance] [--skip-kernels]

Conformance runs in several processes at once, kernel times in one process for each group, all with a time limit: a
case that fails, hangs or breaks its CUDA context hides no others. Exit code 1 where anything failed, 2 where there
is no CUDA device. Writes ``conformance_*.json`` and ``kernel_times.json``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# (area, pattern of names): each a process of its own; compiling kernels is most of their time.
PARTS = (
    ("devices", ""),
    ("memory", ""),
    ("copies", ""),
    ("streams", ""),
    ("launch", ""),
    ("graphs", ""),
    ("drawing", ""),
    *((area, f"^{dtype} ") for area in ("operators", "attention") for dtype in ("bfloat16", "float16", "float32")),
)
PROCESSES = 6
RETRIES_MAX = 24
PART_LIMIT_S = 240
GROUP_LIMIT_S = 120
GROUPS = ("decode", "prefill", "mixed", "elementwise", "linear")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_folder", type=Path)
    parser.add_argument("--skip-conformance", action="store_true")
    parser.add_argument("--skip-kernels", action="store_true")
    arguments = parser.parse_args()
    arguments.out_folder.mkdir(parents=True, exist_ok=True)
    code, output = run(["-c", "from backends import get_backend; print(get_backend('cuda').get_device_info())"], 120)
    print(output.splitlines()[-1] if output else f"no answer, code {code}", flush=True)
    if code != 0:
        return 2
    failures: list[str] = []
    if not arguments.skip_conformance:
        failures += run_conformance(arguments.out_folder)
    if not arguments.skip_kernels:
        failures += run_kernel_times(arguments.out_folder)
    print("\nall passed" if not failures else "\nFAILED:\n  " + "\n  ".join(failures), flush=True)
    return 1 if failures else 0


def run_conformance(out_folder: Path) -> list[str]:
    """Failed checks, and parts that did not come to their end."""
    with ThreadPoolExecutor(max_workers=PROCESSES) as executor:
        parts = list(executor.map(lambda part: run_part(out_folder, *part), PARTS))
    return [failure for failures in parts for failure in failures]


def run_part(out_folder: Path, area: str, pattern: str) -> list[str]:
    name = f"conformance_{area}{pattern.strip('^ ') and '_' + pattern.strip('^ ')}"
    command = ["-m", "backends.conformance", "--backend", "cuda", "--area", area]
    started_s = time.monotonic()
    json_path = str(out_folder / f"{name}.json")
    code, output = run([*command, "--only", pattern, "--json", json_path], PART_LIMIT_S)
    lines = output.splitlines()
    failures = [line[:400] for line in lines if line.startswith("failed")]
    if any("CUDA error" in line for line in failures):
        failures = retried(command, out_folder / f"{name}.json")
    if code not in (0, 1) or not lines:
        failures.append(f"{name} ended with code {code}: {' | '.join(lines[-6:])[-1500:]}")
    last = lines[-1] if lines else ""
    print(f"{name:32} code {code}  {time.monotonic() - started_s:5.1f} s  {last[:160]}", flush=True)
    for failure in failures:
        print(f"    {failure}", flush=True)
    return failures


def retried(command: list[str], path: Path) -> list[str]:
    """A CUDA error makes all later checks of its process fail; each in a process of its own tells which do."""
    failures = []
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    names = [result["name"] for result in results if result["outcome"] == "failed"]
    for name in names[:RETRIES_MAX]:
        _, output = run([*command, "--only", f"^{re.escape(name)}$"], GROUP_LIMIT_S)
        failures += [line[:400] for line in output.splitlines() if line.startswith("failed")]
    return failures + [f"not tried again: {name}" for name in names[RETRIES_MAX:]]


def run_kernel_times(out_folder: Path) -> list[str]:
    """Groups of cases that failed; rows of all others are in the table and in ``kernel_times.json``."""
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    print(f"\n{'kernel':24}{'case':34}{'us':>10}{'torch us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'of peak':>9}", flush=True)
    for group in GROUPS:
        path = out_folder / f"kernel_times_{group}.json"
        script = str(Path(__file__).with_name("measure_kernels.py"))
        code, output = run([script, str(path), "--group", group], GROUP_LIMIT_S)
        print("\n".join(line for line in output.splitlines() if line.startswith("| ")).replace("| ", ""), flush=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        rows += found
        failures += [f"{row['kernel']} {row['case']}: {row['error']}" for row in found if row["error"]]
        if code != 0:
            failures.append(
                f"kernel times {group} ended with code {code}: {' | '.join(output.splitlines()[-6:])[-1500:]}"
            )
    (out_folder / "kernel_times.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return failures


def run(arguments: list[str], limit_s: float) -> tuple[int, str]:
    """Exit code and both outputs of a Python process; 124 where it took too long."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return 124, (expired.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


if __name__ == "__main__":
    sys.exit(main())
