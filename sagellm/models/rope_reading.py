"""The rotary embedding that a ``config.json`` states."""

import math

from sagellm.models.config_schema import LlamaLikeFields, RopeFields
from sagellm.models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

_KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(config: LlamaLikeFields, origin: str) -> Rope:
    """Raises ``ValueError`` where the scaling is of a kind that is not known, or lacks a number."""
    fields = config.rope_parameters or config.rope_scaling or RopeFields()
    if (fields.partial_rotary_factor or config.partial_rotary_factor) != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor must be 1, heads that are rotated in part are not supported")
    theta = fields.rope_theta or config.rope_theta
    match fields.rope_type:
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, LinearScaling(_stated(fields, "factor", origin)))
        case "llama3":
            scaling = Llama3Scaling(
                _stated(fields, "factor", origin),
                _stated(fields, "low_freq_factor", origin),
                _stated(fields, "high_freq_factor", origin),
                int(_stated(fields, "original_max_position_embeddings", origin)),
            )
            return Rope(theta, scaling)
        case "yarn":
            return Rope(theta, _yarn(config, fields, origin))
        case unknown:
            raise ValueError(f"{origin}: rope_type is {unknown!r}, must be one of {', '.join(_KINDS)}")


def _yarn(config: LlamaLikeFields, fields: RopeFields, origin: str) -> YarnScaling:
    if not fields.truncate:
        raise ValueError(f"{origin}: rope truncate is false, must be true: YaRN without rounding is not supported")
    factor = _stated(fields, "factor", origin)
    original = fields.original_max_position_embeddings or config.max_position_embeddings
    if not original:
        raise ValueError(f"{origin}: yarn needs original_max_position_embeddings or max_position_embeddings")
    attention_factor = fields.attention_factor
    if attention_factor is None and fields.mscale and fields.mscale_all_dim:
        attention_factor = _magnitude(factor, fields.mscale) / _magnitude(factor, fields.mscale_all_dim)
    if attention_factor is None:
        attention_factor = _magnitude(factor, 1.0)
    return YarnScaling(factor, original, attention_factor, fields.beta_fast or 32.0, fields.beta_slow or 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _stated(fields: RopeFields, name: str, origin: str) -> float:
    value = getattr(fields, name)
    if value is None:
        raise ValueError(f"{origin}: rope scaling of type {fields.rope_type} needs {name}")
    return float(value)
