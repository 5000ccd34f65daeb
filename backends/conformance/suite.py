"""All checks."""

from backends.conformance.attention_checks import attention_checks
from backends.conformance.check import Check, Subject
from backends.conformance.copy_checks import copy_checks
from backends.conformance.device_checks import device_checks
from backends.conformance.drawing_checks import drawing_checks
from backends.conformance.graph_checks import graph_checks
from backends.conformance.launch_checks import launch_checks
from backends.conformance.logit_kernel_checks import logit_kernel_checks
from backends.conformance.memory_checks import memory_checks
from backends.conformance.operator_checks import operator_checks
from backends.conformance.stream_checks import stream_checks

AREAS = ("devices", "memory", "copies", "streams", "launch", "graphs", "operators", "attention", "drawing")


def all_checks(subject: Subject) -> tuple[Check, ...]:
    """Those of the operators are there once for each type that the backend claims."""
    dtypes = subject.backend.capabilities().dtypes
    return (
        *device_checks(),
        *memory_checks(),
        *copy_checks(),
        *stream_checks(),
        *launch_checks(),
        *graph_checks(),
        *operator_checks(dtypes),
        *attention_checks(dtypes),
        *drawing_checks(),
        *logit_kernel_checks(),
    )
