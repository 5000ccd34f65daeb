"""What a benchmark found, as a JSON file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_json(path: Path, document: "DataclassInstance") -> None:
    """After every step, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(document), indent=1) + "\n", encoding="utf-8")
