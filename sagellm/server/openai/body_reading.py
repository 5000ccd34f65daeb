"""From bytes to a typed body: JSON, types, and what to say of fields that nobody knows."""

import logging
import re
from typing import Any, TypeVar

import msgspec

from sagellm.server.openai.errors import ApiError, invalid

_LOG = logging.getLogger(__name__)
_VALUE_CHARACTERS_MAX = 80
_UNKNOWN_NAMES_MAX = 1000
_FAULT = re.compile(r"Expected `(?P<wish>.+)`, got `.+` - at `\$\.(?P<path>.+)`")
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}

Body = TypeVar("Body", bound=msgspec.Struct)


class UnknownFields:
    """Fields that were sent and are not known: each is told of once in the log, not with every request."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, names: set[str]) -> None:
        """Log those names that were not seen before."""
        for name in sorted(names - self._told):
            if len(self._told) < _UNKNOWN_NAMES_MAX:
                self._told.add(name)
                _LOG.warning("requests have a field %s, which is not known and is ignored", shortened(name))


def read_body(raw: bytes, kind: type[Body], unknown_fields: UnknownFields) -> Body:
    """The body that the bytes spell. Raises ApiError (400) where they are not JSON or have a field of a wrong type."""
    try:
        fields = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is a JSON {_json_kind(fields)}, must be an object")
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown:
        unknown_fields.tell(unknown)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), fields) from error


def _wrong_type(message: str, fields: dict[str, Any]) -> ApiError:
    fault = _FAULT.fullmatch(message)
    if fault is None:
        return invalid(None, f"the body is not as it must be: {message}")
    path = fault["path"]
    name = re.split(r"[.\[]", path, maxsplit=1)[0]
    kinds = [kind for kind in fault["wish"].split(" | ") if kind != "null"]
    wish = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    return invalid(name, f"{path}: {shortened(_value_at(fields, path))}, must be {wish}")


def _value_at(fields: Any, path: str) -> Any:
    """The value that a path like ``stop[1]`` leads to; the innermost one that it does not lose its way to."""
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(fields, list) and step.isdigit():
            fields = fields[int(step)]
        elif isinstance(fields, dict) and step in fields:
            fields = fields[step]
    return fields


def shortened(value: Any) -> str:
    """A value as it stands in a message: in JSON, and never long."""
    try:
        text = msgspec.json.encode(value).decode("utf-8")
    except (TypeError, ValueError, RecursionError, OverflowError):
        text = repr(value)
    return text if len(text) <= _VALUE_CHARACTERS_MAX else text[: _VALUE_CHARACTERS_MAX - 3] + "..."


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "number"
