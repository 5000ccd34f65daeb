"""What a `PDScheduler` is told, and the machines' own configurations that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sagellm.core.config import ControlPlaneConfig, HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId
from sagellm.models.known_models import load_model
from sagellm.models.model_shape import ModelShape

_DECODE_TOKENS = 8192


class PDMode(StrEnum):
    """How prefill and decode share the devices."""

    STRICT = "strict"  # apart: prefill devices hand KV over to decode devices
    TIME_SHARE = "time_share"  # every device does both, in batches of one kind that take turns
    HYBRID = "hybrid"  # every device does both, in one batch


@dataclass(frozen=True, slots=True)
class PDSchedulerConfig:
    """A scheduler's devices, mode and limits. Each device holds one copy of the model.

    In the modes ``time_share`` and ``hybrid`` the two lists of devices mean the same, and may overlap.
    Requests that do not fit ``kv_bytes_max`` are rejected; when the KV of running requests outgrows it,
    the newest is preempted and computed again later.

    Raises ValueError, naming field, value and what would be right.
    """

    prefill_device_ids: Sequence[int] = ()
    decode_device_ids: Sequence[int] = ()
    mode: str = PDMode.STRICT
    max_prefill_batch_size: int = 32  # prompts of which one batch computes some
    max_prefill_tokens: int = 4096
    """Tokens of one batch that computes prompts; in ``hybrid`` its decode tokens are counted in, and in
    ``time_share`` those of the decode batch of the same turn."""
    prefill_chunk_size: int = 512  # tokens of one prompt in one batch
    max_decode_batch_size: int = 256  # requests that one device decodes together
    max_decode_tokens: int | None = None
    """``strict`` only: tokens of one batch of a decode device; 8192 where it is None. It is more than
    ``max_decode_batch_size`` for the sake of preempted requests, which are computed again there."""
    model: str | ModelShape = "Qwen/Qwen2.5-7B"  # a known id, a ``config.json``, or a shape: sizes the KV cache
    kv_bytes_max: int = 16 * 2**30  # for the KV cache of one device
    block_size: int = 16  # tokens
    prefix_caching: bool = True
    strategy: str = "priority"  # who is next: fifo, priority, slo_aware, adaptive
    routing: str = "least_loaded"  # which device: round_robin, least_loaded, power_of_two, prefix_affinity
    handover_start: str = HandoverStart.AT_END  # strict only: "streamed" moves full blocks after each chunk

    def __post_init__(self) -> None:
        _set_enum(self, "mode", PDMode)
        _set_enum(self, "handover_start", HandoverStart)
        for name in ("prefill_device_ids", "decode_device_ids"):
            object.__setattr__(self, name, _checked_device_ids(name, getattr(self, name)))
        _check_devices(self)
        for name in (
            "max_prefill_batch_size", "max_prefill_tokens", "prefill_chunk_size", "max_decode_batch_size",
            "kv_bytes_max", "block_size",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        _check_limits(self)
        if isinstance(self.model, str):
            object.__setattr__(self, "model", load_model(self.model))
        if self.num_blocks < 1:
            raise ValueError(
                f"kv_bytes_max: {self.kv_bytes_max}, must be at least {self.kv_bytes_per_token * self.block_size}, "
                f"which is one block of {self.block_size} tokens of {self.model_shape.name}"
            )

    @property
    def model_shape(self) -> ModelShape:
        assert isinstance(self.model, ModelShape)
        return self.model

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model_shape.kv_bytes_per_token

    @property
    def num_blocks(self) -> int:
        """KV blocks of one device."""
        return self.kv_bytes_max // (self.kv_bytes_per_token * self.block_size)

    @property
    def device_roles(self) -> dict[int, Role]:
        """What each device is for, prefill devices first."""
        if self.mode == PDMode.STRICT:
            return dict.fromkeys(self.prefill_device_ids, Role.PREFILL) | dict.fromkeys(
                self.decode_device_ids, Role.DECODE
            )
        return dict.fromkeys((*self.prefill_device_ids, *self.decode_device_ids), Role.MIXED)


def instance_config(config: PDSchedulerConfig, device_id: int, role: Role) -> InstanceConfig:
    """The machine of one device. A caller gives tokens back batch by batch, so one step is in flight."""
    num_seqs_max, num_tokens_max = config.max_decode_batch_size, config.max_prefill_tokens
    if role is Role.PREFILL:
        num_seqs_max = config.max_prefill_batch_size
    elif role is Role.DECODE:
        num_tokens_max = _DECODE_TOKENS if config.max_decode_tokens is None else config.max_decode_tokens
    return InstanceConfig(
        instance_id=InstanceId(f"device-{device_id}"),
        num_blocks=config.num_blocks,
        role=role,
        block_size=config.block_size,
        kv_bytes_per_token=config.kv_bytes_per_token,
        max_num_seqs=num_seqs_max,
        max_num_batched_tokens=num_tokens_max,
        max_num_chunks=config.max_prefill_batch_size,
        max_chunk_tokens=config.prefill_chunk_size,
        steps_in_flight_max=1,
        repeat_max=1,
        prefix_caching=config.prefix_caching,
    )


def control_plane_config(config: PDSchedulerConfig) -> ControlPlaneConfig:
    """A device is sent what fills a batch chunk by chunk; the rest waits in the strategy's order."""
    num_chunks = -(-config.max_prefill_tokens // config.prefill_chunk_size)
    return ControlPlaneConfig(
        strategy=config.strategy,
        routing=config.routing,
        dispatch_tokens_max=num_chunks * config.max_prefill_tokens,
        handover_start=HandoverStart(config.handover_start),
    )


def _set_enum(config: PDSchedulerConfig, name: str, kind: type[StrEnum]) -> None:
    value = getattr(config, name)
    known = [str(member) for member in kind]
    if value not in known:
        raise ValueError(f"{name}: {value!r}, must be one of {', '.join(known)}")
    object.__setattr__(config, name, kind(value))


def _checked_device_ids(name: str, device_ids: Sequence[int]) -> tuple[int, ...]:
    seen: dict[int, None] = {}
    for device_id in device_ids:
        if not isinstance(device_id, int) or isinstance(device_id, bool) or device_id < 0:
            raise ValueError(f"{name}: {device_id!r}, must be whole numbers of 0 or more")
        if device_id in seen:
            raise ValueError(f"{name}: {list(device_ids)}, must name device {device_id} once")
        seen[device_id] = None
    return tuple(seen)


def _check_devices(config: PDSchedulerConfig) -> None:
    if config.mode != PDMode.STRICT:
        if not config.prefill_device_ids and not config.decode_device_ids:
            raise ValueError("prefill_device_ids, decode_device_ids: both are empty, must name 1 device or more")
        return
    for name in ("prefill_device_ids", "decode_device_ids"):
        if not getattr(config, name):
            raise ValueError(f"{name}: [], must name 1 device or more in mode strict")
    for device_id in config.decode_device_ids:
        if device_id in config.prefill_device_ids:
            raise ValueError(
                f"decode_device_ids: {device_id} is in prefill_device_ids too, must be in one of them in mode strict; "
                f"modes time_share and hybrid let a device do both"
            )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {value!r}, must be a whole number of 1 or more")


def _check_limits(config: PDSchedulerConfig) -> None:
    at_least = [("max_prefill_tokens", "max_prefill_batch_size"), ("max_prefill_tokens", "prefill_chunk_size")]
    if config.mode == PDMode.STRICT:
        if config.max_decode_tokens is not None:
            _check_count("max_decode_tokens", config.max_decode_tokens)
            at_least.append(("max_decode_tokens", "max_decode_batch_size"))
        elif config.max_decode_batch_size > _DECODE_TOKENS:
            raise ValueError(
                f"max_decode_tokens: None (which is {_DECODE_TOKENS}), must be at least max_decode_batch_size "
                f"({config.max_decode_batch_size})"
            )
    else:
        at_least.append(("max_prefill_tokens", "max_decode_batch_size"))
        if config.max_decode_tokens is not None:
            raise ValueError(
                f"max_decode_tokens: {config.max_decode_tokens}, must be left out in mode {config.mode}: "
                f"max_prefill_tokens bounds a device's batches there"
            )
        if config.handover_start != HandoverStart.AT_END:
            raise ValueError(
                f"handover_start: {str(config.handover_start)!r}, must be left out in mode {config.mode}: "
                f"no KV is handed over there"
            )
    for larger, smaller in at_least:
        if getattr(config, larger) < getattr(config, smaller):
            raise ValueError(
                f"{larger}: {getattr(config, larger)}, must be at least {smaller} ({getattr(config, smaller)})"
            )
