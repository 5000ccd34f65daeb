"""A CSV file as columns of text, and its columns as numbers, each with its line number for errors."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from traces.errors import TraceError, bad_value


@dataclass(frozen=True, slots=True)
class CsvTable:
    """A header's names and a column of text for each; ``line_numbers[row]`` is the row's line in the file."""

    path: str
    columns: dict[str, tuple[str, ...]]
    line_numbers: Sequence[int]

    def error(self, row: int, name: str, expected: str) -> TraceError:
        """The error for one value; ``expected`` says what would be right."""
        return bad_value(self.path, self.line_numbers[row], name, self.columns[name][row].strip(), expected)

    def counts(self, name: str, minimum: int) -> list[int]:
        """A column of whole numbers; raises TraceError at the first that is none or below ``minimum``."""
        column = self.columns[name]
        digits = "".join(column)
        if digits.isascii() and digits.isdigit() and "" not in column:
            values = list(map(int, column))
        else:
            values = [_count(text.strip()) for text in column]
        if min(values) < minimum:
            row = next(row for row, value in enumerate(values) if value < minimum)
            raise self.error(row, name, f"a whole number of {minimum} or more")
        return values

    def times_ns(
        self, name: str, parse: Callable[[Sequence[str]], list[int | None]], expected: str, *, ordered: bool
    ) -> list[int]:
        """A column of times, none before the one above it where ``ordered``, from the earliest on.

        Raises TraceError at the first that ``parse`` gives None for, or that is out of order.
        """
        column = self.columns[name]
        parsed = parse(column)
        if None in parsed:
            raise self.error(parsed.index(None), name, expected)
        values = cast("list[int]", parsed)
        if values != (in_order := sorted(values)) and ordered:
            row = next(row for row, (last, this) in enumerate(pairwise(values), start=1) if this < last)
            raise self.error(
                row, name, f"no earlier than {column[row - 1].strip()!r} in the row above it: sort the rows by time"
            )
        start_ns = in_order[0]
        return [value - start_ns for value in values]


def _count(text: str) -> int:
    """The number that the text is, or -1: no count is negative."""
    return int(text) if text.isascii() and text.isdigit() else -1


def parse_csv(path: str, text: str) -> CsvTable:
    """Split a CSV text with a header line; empty lines do not count.

    Raises TraceError for a row that has not as many values as the header, and for a file without rows.
    """
    lines = text.splitlines()
    numbers: Sequence[int] = range(1, len(lines) + 1)
    if '"' in text or len({line.count(",") for line in lines}) > 1 or "" in lines:
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
        rows = _rows(path, [lines[number - 1] for number in numbers], numbers)
        values = [value for row in rows for value in row]
        header = rows[0]
    else:
        values = ",".join(lines).split(",")
        header = lines[0].split(",")
    if len(numbers) < 2:
        raise TraceError(f"{path}: there is no request below the header, but a trace must have one or more")
    width = len(header)
    columns = {name.strip(): tuple(values[width + column :: width]) for column, name in enumerate(header)}
    return CsvTable(path, columns, numbers[1:])


def header_of(text: str) -> tuple[str, ...]:
    """The names in the first line, of a text that does not begin with an empty one; as `parse_csv` reads them."""
    first_line = (text[: text.find("\n")] if "\n" in text else text).splitlines()[0]
    try:
        names = next(csv.reader([first_line], strict=True), [])
    except csv.Error:  # to be told by `parse_csv`, if that is what the file is
        names = first_line.split(",")
    return tuple(name.strip() for name in names)


def _rows(path: str, lines: list[str], numbers: Sequence[int]) -> list[list[str]]:
    """The lines' values, with quotation marks undone, as many in each line as in the first."""
    rows: list[list[str]] = []
    for number, line in zip(numbers, lines, strict=True):
        try:
            row = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise TraceError(f"{path}, line {number}: a quotation mark must be closed on its line ({error})") from None
        rows.append(row)
        if len(row) != len(rows[0]):
            raise TraceError(
                f"{path}, line {number}: the row has {len(row)} values, but must have {len(rows[0])}, "
                f"one for each of {', '.join(rows[0])}"
            )
    return rows
