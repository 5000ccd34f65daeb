"""Rotary position embedding: how fast each pair of a head's elements turns."""

import math

import msgspec


class Llama3Scaling(msgspec.Struct, frozen=True, tag="llama3"):
    """Slow frequencies divided by ``factor``, fast ones kept, those between blended (Llama 3.1, 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class LinearScaling(msgspec.Struct, frozen=True, tag="linear"):
    """All frequencies divided by ``factor`` (Chen et al., Positional Interpolation, 2023)."""

    factor: float


class YarnScaling(msgspec.Struct, frozen=True, tag="yarn"):
    """As Peng et al., YaRN, 2023: the ramp between kept and divided frequencies is set by numbers of rotations."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float  # that cosines and sines are multiplied by
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Rope(msgspec.Struct, frozen=True):
    """The base of the frequencies, and how they are scaled for contexts beyond those of the training."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    def inverse_frequencies(self, head_dim: int) -> tuple[float, ...]:
        """Radians for each position, of each of ``head_dim / 2`` pairs of elements."""
        plain = [self.theta ** (-2 * index / head_dim) for index in range(head_dim // 2)]
        match self.scaling:
            case None:
                return tuple(plain)
            case LinearScaling(factor):
                return tuple(frequency / factor for frequency in plain)
            case Llama3Scaling() as scaling:
                return tuple(_llama3(frequency, scaling) for frequency in plain)
            case YarnScaling() as scaling:
                return _yarn(plain, scaling, self.theta, head_dim)


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if rotations < scaling.low_freq_factor:
        return frequency / scaling.factor
    if rotations > scaling.high_freq_factor:
        return frequency
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: list[float], scaling: YarnScaling, theta: float, head_dim: int) -> tuple[float, ...]:
    def index_of(num_rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), head_dim - 1)
    width = high - low or 0.001
    frequencies = []
    for index, frequency in enumerate(plain):
        divided = min(max((index - low) / width, 0.0), 1.0)
        frequencies.append(frequency * (1 - divided) + frequency / scaling.factor * divided)
    return tuple(frequencies)
