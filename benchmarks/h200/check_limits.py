"""What happens where something is missing or too small, provoked on a real device; a table, and JSON.

    python -m benchmarks.h200.check_limits OUT.json [--backend cuda] [--only PATTERN]

Each case runs in a process of its own, with a time limit; those that take the whole device's memory one after the
other, all others beside each other. Outputs are held against transformers. Exit code 1 where a case is not as it
must be.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.h200 import limit_cases
from benchmarks.h200.limit_cases import CaseInput
from benchmarks.h200.limit_models import SMALL_MODELS, make_models

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 90
TOGETHER = 12
_RESULT = "seen: "


@dataclass(frozen=True, slots=True)
class Case:
    """``alone``: it takes the memory of all others; ``needs_device``: which the host of a CPU must not be robbed of."""

    name: str
    expected: str
    run: Callable[[CaseInput], str]
    alone: bool = False
    needs_device: bool = False
    needs_models: bool = True
    hides_triton: bool = False
    hides_compiler: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    expected: str
    seen: str
    ok: bool
    duration_s: float
    stderr: list[str]


CASES = (
    Case("weights too large", "refused before they are drawn", limit_cases.weights_too_large, needs_models=False),
    Case(
        "the same, by sagellm serve",
        "exit code 2, one line, no process left",
        limit_cases.serve_refused,
        needs_models=False,
    ),
    Case("KV too large", "says how many tokens fit; half of them do", limit_cases.kv_too_large, alone=True),
    Case(
        "largest step does not fit",
        "refused, says what to lower",
        limit_cases.step_too_large,
        alone=True,
        needs_device=True,
    ),
    Case(
        "first capture out of memory",
        "one warning, outputs right, memory given back",
        partial(limit_cases.capture_out_of_memory, num_captured=0),
        alone=True,
        needs_device=True,
    ),
    Case(
        "third capture out of memory",
        "outputs right, memory given back",
        partial(limit_cases.capture_out_of_memory, num_captured=2),
        alone=True,
        needs_device=True,
    ),
    Case(
        "steps out of memory",
        "retried, then failed cleanly; the instance lives",
        limit_cases.serving_out_of_memory,
        alone=True,
        needs_device=True,
    ),
    Case("triton absent", "one warning, outputs right", limit_cases.triton_absent, hides_triton=True),
    Case("C compiler absent", "one warning, outputs right", limit_cases.compiler_absent, hides_compiler=True),
    *(
        Case(
            f"{model.name}, {model.dtype}",
            "outputs right" if model.in_kernels else "one warning, outputs right",
            partial(limit_cases.heads, model=model),
        )
        for model in SMALL_MODELS
    ),
)


def main() -> int:
    arguments = parsed()
    if arguments.case:
        return run_here(arguments.case, CaseInput(arguments.backend, arguments.folder))
    if arguments.make_models:
        make_models(arguments.folder, arguments.backend)
        return 0
    begin_s = time.monotonic()
    cases = [case for case in CASES if re.search(arguments.only, case.name)]
    with tempfile.TemporaryDirectory() as name:
        results = run_all(cases, arguments.backend, Path(name))
    arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    print_table(results, time.monotonic() - begin_s)
    return 0 if all(result.ok for result in results) else 1


def run_all(cases: list[Case], backend: str, folder: Path) -> list[Result]:
    """Models are made while the cases run that need none."""
    with ThreadPoolExecutor(TOGETHER if backend == "cuda" else 1) as pool:
        early = [pool.submit(run_apart, case, backend, folder) for case in cases if not case.needs_models]
        made = pool.submit(run_python, ["--make-models"], backend, folder, dict(os.environ))
        code, _, stderr = made.result()
        if code != 0:
            print(f"making models ended with code {code}: {stderr.strip().splitlines()[-1:]}", flush=True)
        late = [case for case in cases if case.needs_models and not case.alone]
        found = [pool.submit(run_apart, case, backend, folder) for case in late]
    alone = [case for case in cases if case.alone and (backend == "cuda" or not case.needs_device)]
    return [
        *(each.result() for each in (*early, *found)),
        *(run_apart(case, backend, folder) for case in alone),
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--only", default="", help="a pattern of names of cases")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--make-models", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_here(name: str, given: CaseInput) -> int:
    """One case, in a process that was started for it."""
    case = next(case for case in CASES if case.name == name)
    if case.hides_triton:
        sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        print(_RESULT + case.run(given), flush=True)
    except AssertionError as error:
        print(f"{_RESULT}{error}", flush=True)
        return 1
    return 0


def run_apart(case: Case, backend: str, folder: Path) -> Result:
    """One case in a process of its own."""
    environment = dict(os.environ)
    if case.hides_compiler:
        environment |= {"CC": str(folder / "no-compiler"), "TRITON_CACHE_DIR": str(folder / "empty")}
    begin_s = time.monotonic()
    code, stdout, stderr = run_python(["--case", case.name], backend, folder, environment)
    lines = [line for line in stdout.splitlines() if line.startswith(_RESULT)]
    said = [line for line in stderr.splitlines() if line.strip()]
    seen = lines[-1].removeprefix(_RESULT) if lines else f"ended with code {code}: {' | '.join(said[-3:])}"
    ok = code == 0 and "Traceback" not in stderr
    if code == 0 and not ok:
        seen += f" - but there was a traceback: {said[-1]}"
    result = Result(case.name, case.expected, seen, ok, time.monotonic() - begin_s, said)
    print(f"{result.duration_s:6.1f} s  {'ok    ' if ok else 'NOT OK'}  {case.name}: {seen[:300]}", flush=True)
    return result


def run_python(options: list[str], backend: str, folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """This script with further options: exit code (124 where it took too long) and both outputs."""
    path = environment.get("PYTHONPATH", "")
    environment = {**environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.h200.check_limits", "-", "--backend", backend, "--folder", str(folder)]
    try:
        done = subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as expired:
        return 124, "", (expired.stderr or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def print_table(results: list[Result], duration_s: float) -> None:
    print(f"\n{'case':34}{'expected':50}{'ok':8}seen")
    for result in results:
        print(f"{result.case:34}{result.expected:50}{'yes' if result.ok else 'NO':8}{result.seen[:160]}")
    num_ok = sum(result.ok for result in results)
    print(f"{num_ok} of {len(results)} as they must be; {duration_s:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
