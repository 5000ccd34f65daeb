"""What goes wrong with traces, said in one sentence."""


class TraceError(ValueError):
    """A trace that cannot be read, written, reshaped or generated. The message is for the user as it is."""


def bad_value(path: str, line: int, field: str, value: object, expected: str) -> TraceError:
    """The error for one wrong value of one line: names file, line, field, value and what would be right."""
    shown = "missing" if value is None or value == "" else repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return TraceError(f"{path}, line {line}: {field} is {shown}, but must be {expected}")
