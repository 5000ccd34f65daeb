"""A YAML text as plain values, with the line of every key, so that errors can point at it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sagellm.cluster.errors import ClusterFileError

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ParsedYaml:
    """A file's values, and where they stand."""

    source: str  # how to call the file in messages
    values: Any
    lines: Mapping[FieldPath, int]  # from 1

    def error(self, path: FieldPath, problem: str) -> ClusterFileError:
        """The one sentence: file, line, field and what is wrong with it."""
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = nearest[:-1]
        line = f":{self.lines[nearest]}" if nearest in self.lines else ""
        field = f"{dotted(path)}: " if path else ""
        return ClusterFileError(f"{self.source}{line}: {field}{problem}")


def dotted(path: FieldPath) -> str:
    """``("instances", 0, "role")`` as ``instances[0].role``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def parse_yaml(text: str, source: str) -> ParsedYaml:
    """Parse ``text``; ``source`` names it in errors.

    Raises:
        ClusterFileError: it is not YAML, is empty, or has a key twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ClusterFileError(f"{source}: the file is empty; `sagellm clusters show h200x1` prints one")
        lines = dict(_lines(node, (), source))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ClusterFileError(f"{source}{line}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ClusterFileError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    return ParsedYaml(source, values, lines)


def _lines(node: yaml.Node, path: FieldPath, source: str) -> Iterator[tuple[FieldPath, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, (*path, index), source)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in seen:
                raise ClusterFileError(f"{source}:{line}: {dotted((*path, name))}: the key stands here twice; keep one")
            seen.add(name)
            yield from _lines(value, (*path, name), source)
            yield (*path, name), line
