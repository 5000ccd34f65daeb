"""``python -m backends.conformance --backend NAME``: the table of checks; exit code 1 where one failed."""

import argparse
import json
import re
import sys
from pathlib import Path

from backends.conformance.check import Subject
from backends.conformance.runner import CheckResult, count, result_line, results_as_json, run_checks
from backends.conformance.suite import AREAS, all_checks
from backends.errors import BackendUnavailableError, UnknownBackendError
from backends.operators.registry import KernelRegistry
from backends.registry import get_backend


def main() -> int:
    arguments = _parser().parse_args()
    try:
        backend = get_backend(arguments.backend)
    except (BackendUnavailableError, UnknownBackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    registry = KernelRegistry()
    backend.register_operators(registry)
    subject = Subject(backend, registry)
    info = backend.get_device_info()
    print(f"{backend.name}: {backend.get_device_count()} device(s), {info.name}, {info.driver}")
    wanted = tuple(arguments.area or AREAS)
    checks = [check for check in all_checks(subject) if check.area in wanted and re.search(arguments.only, check.name)]
    results = run_checks(subject, checks, _print_result)
    print(", ".join(f"{count(results, outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results_as_json(subject, results), indent=2) + "\n", encoding="utf-8")
    return 1 if count(results, "failed") else 0


def _print_result(result: CheckResult) -> None:
    print(result_line(result), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m backends.conformance", description=__doc__)
    parser.add_argument("--backend", help="default: the best that can be used here")
    parser.add_argument("--area", action="append", choices=AREAS, help="may be given several times; default: all")
    parser.add_argument("--only", metavar="PATTERN", default="", help="checks whose name this regular expression finds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
