"""The CPU backend passes the conformance suite, check by check."""

import pytest

from backends.conformance.check import Check, NotClaimedError, Subject
from backends.conformance.suite import AREAS, all_checks
from backends.operators.registry import KernelRegistry
from backends.registry import get_backend


def _subject() -> Subject:
    backend = get_backend("cpu")
    registry = KernelRegistry()
    backend.register_operators(registry)
    return Subject(backend, registry)


SUBJECT = _subject()
CHECKS = all_checks(SUBJECT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.area}: {check.name}")
def test_check(check: Check) -> None:
    try:
        check.run(SUBJECT)
    except NotClaimedError as reason:
        pytest.skip(str(reason))


def test_each_area_has_checks_and_each_check_a_name_of_its_own() -> None:
    assert {check.area for check in CHECKS} == set(AREAS)
    assert len({(check.area, check.name) for check in CHECKS}) == len(CHECKS)
