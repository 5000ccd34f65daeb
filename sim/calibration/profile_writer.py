"""Writes profiles as ``backends.profile_files`` reads them: one list on a line, so that changes can be read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import AnalyticProfile, FittedProfile
from sagellm.cost_model.step_cost import FEMTOSECONDS_PER_NANOSECOND

Json = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None


def write_profile(profile: AnalyticProfile | FittedProfile, path: Path) -> None:
    path.write_text(_render(profile_json(profile), 0) + "\n", encoding="utf-8")


def profile_json(profile: AnalyticProfile | FittedProfile) -> dict[str, Json]:
    """The content of the profile's file."""
    if isinstance(profile, AnalyticProfile):
        content = asdict(profile)
        content = {name: value for name, value in content.items() if value is not None}
        return {"schema": 1, "kind": "analytic", **content}
    return {
        "schema": 1,
        "kind": "fitted",
        "header": asdict(profile.header),
        "device": asdict(profile.device),
        "model": profile.model.name,
        "tp": profile.tp,
        "graph_sizes": profile.table.graph_sizes,
        "prices": _prices_json(profile.table),
        "memory": asdict(profile.memory),
        "request_overhead_ns": profile.request_overhead_ns,
        "steps_in_flight_max": profile.steps_in_flight_max,
        "plan_lead_ns": profile.plan_lead_ns,
    }


def _prices_json(table: StepPriceTable) -> dict[str, Json]:
    prices: dict[str, Json] = {}
    for name, value in asdict(table).items():
        if name == "graph_sizes" or (name.startswith("sustained") and not table.sustained_extra_permille):
            continue
        if name.endswith("_fs"):
            name, value = name.removesuffix("_fs") + "_ns", _nanoseconds(value)
        prices[name] = value
    return prices


def _nanoseconds(value: int | tuple[int, ...]) -> Json:
    if isinstance(value, tuple):
        return tuple(entry / FEMTOSECONDS_PER_NANOSECOND for entry in value)
    return value / FEMTOSECONDS_PER_NANOSECOND


def _render(value: Json, depth: int) -> str:
    """JSON with objects spread over lines and lists of numbers on one."""
    inner, outer = " " * (depth + 1), " " * depth
    if isinstance(value, Mapping):
        if depth > 2:
            return json.dumps(value)
        entries = [f"{inner}{json.dumps(key)}: {_render(entry, depth + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{outer}}}"
    if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(e, Mapping | str) for e in value):
        return "[\n" + ",\n".join(f"{inner}{_render(entry, 9)}" for entry in value) + f"\n{outer}]"
    return json.dumps(value)
