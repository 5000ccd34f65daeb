"""Graph capture, where it is claimed; elsewhere it must be refused."""

import torch

from backends.conformance.check import Check, Subject, claimed, expect, expect_raises
from backends.errors import GraphError, UnsupportedError


def graph_checks() -> tuple[Check, ...]:
    return (
        Check("graphs", "without the capability a graph is refused", _refused),
        Check("graphs", "capturing runs nothing, each replay runs all of it", _replay),
        Check("graphs", "a replay reads what is in its memory then", _fresh_inputs),
        Check("graphs", "replay before capture and a second capture are refused", _misuse),
        Check("graphs", "after reset a graph is captured anew", _reset),
        Check("graphs", "two graphs do not disturb each other", _two_graphs),
    )


def _refused(subject: Subject) -> None:
    if not subject.backend.capabilities().graph_capture:
        expect_raises(UnsupportedError, subject.backend.create_graph, "create_graph without the capability")


def _replay(subject: Subject) -> None:
    claimed(subject.backend.capabilities().graph_capture, "graph capture")
    backend = subject.backend
    number = _number(subject, 1)
    graph = backend.create_graph()
    with graph.capture():
        number.mul_(2)
        number.add_(1)
    backend.synchronize()
    expect(number.item() == 1, f"capturing changed the number to {number.item()}")
    for expected in (3, 7, 15):
        graph.replay()
        backend.synchronize()
        expect(number.item() == expected, f"2 x + 1 gave {number.item()}, must give {expected}")


def _fresh_inputs(subject: Subject) -> None:
    claimed(subject.backend.capabilities().graph_capture, "graph capture")
    backend = subject.backend
    x = backend.allocate_tensor((64, 64), torch.float32)
    x.fill_(0.5)
    _ = x @ x
    graph = backend.create_graph()
    with graph.capture():
        product = x @ x
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        graph.replay()
        backend.synchronize()
        expect(product[0, 0].item() == 64 * value * value, f"64 x {value}^2 gave {product[0, 0].item()}")


def _misuse(subject: Subject) -> None:
    claimed(subject.backend.capabilities().graph_capture, "graph capture")
    graph = subject.backend.create_graph()
    expect_raises(GraphError, graph.replay, "a replay before the capture")
    number = _number(subject, 1)
    with graph.capture():
        number.add_(1)

    def capture_again() -> None:
        with graph.capture():
            number.add_(1)

    expect_raises(GraphError, capture_again, "a second capture")


def _reset(subject: Subject) -> None:
    claimed(subject.backend.capabilities().graph_capture, "graph capture")
    number = _number(subject, 0)
    graph = subject.backend.create_graph()
    for step in (1, 10):
        with graph.capture():
            number.add_(step)
        graph.replay()
        subject.backend.synchronize()
        graph.reset()
        expect_raises(GraphError, graph.replay, "a replay after the reset")
    expect(number.item() == 11, f"1 + 10 gave {number.item()}")


def _two_graphs(subject: Subject) -> None:
    claimed(subject.backend.capabilities().graph_capture, "graph capture")
    backend = subject.backend
    x = backend.allocate_tensor((4096,), torch.float32)
    x.fill_(1.0)
    graphs, results = [], []
    for step in (1.0, 2.0):
        graph = backend.create_graph()
        with graph.capture():
            results.append((x + step) * 10)
        graphs.append(graph)
    for graph in (graphs[0], graphs[1], graphs[0]):
        graph.replay()
    backend.synchronize()
    found = [result[0].item() for result in results]
    expect(found == [20.0, 30.0], f"(1 + 1) x 10 and (1 + 2) x 10 gave {found}")


def _number(subject: Subject, value: int) -> torch.Tensor:
    number = subject.backend.allocate_tensor((1,), torch.int64)
    number.fill_(value)
    subject.backend.synchronize()
    return number
