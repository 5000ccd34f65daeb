"""A file of JSON lines as records, and their fields as columns, each with its line number for errors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from traces.errors import TraceError, bad_value


@dataclass(frozen=True, slots=True)
class JsonTable:
    """One record per line; ``line_numbers[row]`` is the record's line in the file."""

    path: str
    records: list[dict[str, Any]]
    line_numbers: Sequence[int]

    def error(self, row: int, name: str, expected: str) -> TraceError:
        """The error for one value; ``expected`` says what would be right."""
        return bad_value(self.path, self.line_numbers[row], name, self.records[row].get(name), expected)

    def column(self, name: str, default: Any = None) -> list[Any]:
        """A field of every record, ``default`` where a record lacks it."""
        return [record.get(name, default) for record in self.records]

    def counts(self, name: str, minimum: int, default: int | None = None) -> list[int]:
        """A field of whole numbers; raises TraceError at the first that is none or below ``minimum``."""
        values = self.column(name, default)
        if set(map(type, values)) != {int} or min(values) < minimum:
            row = next(row for row, value in enumerate(values) if type(value) is not int or value < minimum)
            raise self.error(row, name, f"a whole number of {minimum} or more")
        return values

    def id_lists(self, name: str, num_tokens: Sequence[int], block_size: int) -> list[tuple[int, ...]]:
        """A field of lists of whole numbers, in records that may lack it.

        Raises TraceError where a list is there and has not one id for each ``block_size`` tokens
        begun of ``num_tokens``.
        """
        lists = self.column(name, ())
        for row, ids in enumerate(lists):
            if not isinstance(ids, list | tuple) or not set(map(type, ids)) <= {int}:
                raise self.error(row, name, "a list of whole numbers")
            num_blocks = -(-num_tokens[row] // block_size) if block_size else 0
            if ids and len(ids) != num_blocks:
                raise TraceError(
                    f"{self.path}, line {self.line_numbers[row]}: {name} has {len(ids)} ids, but must have {num_blocks}"
                    f", one for each {block_size} tokens begun of {num_tokens[row]}"
                )
        return list(map(tuple, lists))

    def check_order(self, name: str, values: Sequence[float]) -> None:
        """Raise TraceError at the first record whose ``values`` is less than that of the record before it."""
        for row, (last, this) in enumerate(pairwise(values), start=1):
            if this < last:
                raise self.error(row, name, f"no less than {last} in the line above it: sort the lines by time")


def parse_json_lines(path: str, text: str) -> JsonTable:
    """Decode each line that is not empty.

    Raises TraceError for a line that is not one whole JSON object.
    """
    decode = json.JSONDecoder().decode
    records: list[dict[str, Any]] = []
    line_numbers: list[int] = []
    # Only a line feed ends a JSON line: str.splitlines also splits at characters that may stand in a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            record = decode(line)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"{path}, line {number}: not a whole JSON object ({error.msg} at column {error.colno}), but each line "
                f"must be one; is the file cut off?"
            ) from None
        except RecursionError:
            raise TraceError(f"{path}, line {number}: nested too deep, but must be one flat JSON object") from None
        if type(record) is not dict:
            raise TraceError(f"{path}, line {number}: {line.strip()[:60]!r} is not a JSON object, but must be")
        records.append(record)
        line_numbers.append(number)
    return JsonTable(path, records, line_numbers)
