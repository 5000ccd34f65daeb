"""How many tokens' KV fits beside the weights."""

from sagellm.cost_model.footprint import activation_bytes, rank_weight_bytes
from sagellm.cost_model.profile import FittedProfile, Profile
from sagellm.models.model_shape import ModelShape
from sagellm.runtime.execution_graph.tensors import StepSizes

GIB = 1 << 30


LARGEST_STEP = StepSizes(num_tokens=8192, num_seqs=256, num_sampled=256)
"""What activations are sized for where nothing else is said."""


def kv_capacity_tokens(
    profile: Profile,
    model: ModelShape,
    tp: int,
    memory_utilisation: float | None = None,
    largest_step: StepSizes = LARGEST_STEP,
) -> int:
    """Tokens whose KV fits on ``tp`` devices: memory x utilisation - weights - activations.

    Activations take what the profile states of its engine, and no less than what the execution graph needs
    for ``largest_step``. A measured figure of the profile is used where it is for this very model, tp and
    utilisation.
    Raises ``ValueError`` where not even one token fits, naming the model, the GiB needed and those there.
    """
    model.check_tp(tp)
    utilisation = profile.memory.memory_utilisation if memory_utilisation is None else memory_utilisation
    if not 0 < utilisation <= 1:
        raise ValueError(f"memory_utilisation: {utilisation}, must be above 0 and at most 1")
    if isinstance(profile, FittedProfile) and profile.is_for(model, tp):
        measured = profile.memory.kv_tokens_measured
        if measured and utilisation == profile.memory.memory_utilisation:
            return measured
    usable = int(profile.device.memory_bytes * utilisation)
    activations = max(profile.memory.activation_bytes, activation_bytes(model, tp, largest_step))
    needed = rank_weight_bytes(model, tp) + activations
    rank_kv_bytes = 2 * model.num_layers * model.kv_heads_per_rank(tp) * model.head_dim * model.dtype_bytes
    if needed + rank_kv_bytes > usable:
        raise ValueError(
            f"{model.name} needs {needed / GIB:.1f} GiB on each of {tp} x {profile.header.hardware} for weights and "
            f"activations, but {usable / GIB:.1f} GiB are there at utilisation {utilisation:g}; raise tp"
        )
    return (usable - needed) // rank_kv_bytes


def kv_capacity_blocks(
    profile: Profile, model: ModelShape, tp: int, block_size: int = 16, memory_utilisation: float | None = None
) -> int:
    """Whole KV blocks that fit; raises ``ValueError`` as ``kv_capacity_tokens``."""
    blocks = kv_capacity_tokens(profile, model, tp, memory_utilisation) // block_size
    if blocks < 1:
        raise ValueError(f"{model.name}: not one block of {block_size} tokens fits on {profile.header.hardware}")
    return blocks
