"""What a measured profile says of itself beside its prices: the machine, the software, the day."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.profile_files import load_profile
from sagellm import __version__
from sagellm.cost_model.price_table import StepPriceTable
from sagellm.cost_model.profile import EngineMemory, FittedProfile, ProfileHeader
from sagellm.models.known_models import load_model

PROCESSORS_FILE = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, and how. ``device_profile`` names the profile whose device sheet is taken over.

    ``hardware`` and ``software`` are told where another machine was measured than this one; empty: this one is asked.
    """

    model: str
    backend: str
    device_profile: str
    num_threads: int  # of the CPU backend; 0: as torch likes
    source: str
    fit_error: str
    notes: tuple[str, ...] = ()
    name: str = ""  # empty: the backend's measured profile
    hardware: str = ""
    software: str = ""


def measured_profile(
    measurement: Measurement, table: StepPriceTable, request_overhead_ns: int, plan_lead_ns: int = 0
) -> FittedProfile:
    """Raises ValueError where the model or the device profile is not known."""
    device = load_profile(measurement.device_profile)
    return FittedProfile(
        header=ProfileHeader(
            name=measurement.name or f"{measurement.backend}/measured",
            hardware=measurement.hardware or hardware_name(measurement.backend, measurement.num_threads),
            engine=f"sageLLM {__version__}, {measurement.backend} backend{_software(measurement)}",
            date=time.strftime("%Y-%m-%d"),
            source=measurement.source,
            status="measured",
            fit_error=measurement.fit_error,
            notes=(f"device sheet of {measurement.device_profile}", *measurement.notes),
        ),
        device=device.device,
        model=load_model(measurement.model),
        tp=1,
        table=table,
        memory=EngineMemory(device.memory.memory_utilisation, device.memory.activation_bytes),
        request_overhead_ns=request_overhead_ns,
        plan_lead_ns=plan_lead_ns,
    )


def hardware_name(backend: str, num_threads: int) -> str:
    """The device by name, and how much of it was used."""
    if backend not in ("cpu", "none"):
        from backends.registry import get_backend

        return get_backend(backend).get_device_info(0).name
    names = _processor_names()
    processor = f"{len(names)} x {names[0]}" if names else "a processor without a name"
    if not num_threads:
        return f"{processor}, threads as torch likes"
    return f"{processor}, {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def _processor_names() -> Sequence[str]:
    if not PROCESSORS_FILE.exists():
        return ()
    lines = PROCESSORS_FILE.read_text(encoding="utf-8").splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]


def _software(measurement: Measurement) -> str:
    if measurement.software:
        return f", {measurement.software}"
    if measurement.backend == "none":
        return ""
    import torch

    return f", torch {torch.__version__}"
