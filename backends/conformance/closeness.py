"""When a result is as close to the exact one as its type allows."""

from dataclasses import dataclass

import torch

from backends.conformance.check import expect


@dataclass(frozen=True, slots=True)
class Tolerance:
    """For results whose elements are about 1 large.

    Each element may differ by ``absolute + relative * |exact|``, all together by ``mean_square`` of the exact
    result's root mean square: errors that are small but everywhere show there.
    """

    absolute: float
    relative: float
    mean_square: float


# A few units in the last place of each type, since operators round between their stages:
# the last place is worth 2^-23 of a float32, 2^-10 of a float16, 2^-7 of a bfloat16.
TOLERANCES = {
    torch.float32: Tolerance(absolute=3e-5, relative=1e-5, mean_square=3e-6),
    torch.float16: Tolerance(absolute=5e-3, relative=3e-3, mean_square=1e-3),
    torch.bfloat16: Tolerance(absolute=4e-2, relative=2e-2, mean_square=7e-3),
}


def expect_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises ConformanceError where ``found``, computed in ``dtype``, is not as close as that type allows."""
    found = found.detach().cpu()
    expect(found.shape == exact.shape, f"{what} has shape {tuple(found.shape)}, must be {tuple(exact.shape)}")
    expect(found.dtype == dtype, f"{what} is {found.dtype}, must be {dtype}")
    if exact.numel() == 0:
        return
    tolerance = TOLERANCES[dtype]
    exact = exact.double()
    difference = (found.double() - exact).abs()
    expect(bool(torch.isfinite(difference).all()), f"{what} has {int((~torch.isfinite(found)).sum())} infinite or nan")
    excess = difference - (tolerance.absolute + tolerance.relative * exact.abs())
    worst = int(excess.argmax())
    expect(
        excess.flatten()[worst].item() <= 0,
        f"{what}: element {worst} is {found.flatten()[worst].item():.6g}, must be {exact.flatten()[worst].item():.6g}",
    )
    mean_square = (difference.square().mean() / exact.square().mean().clamp(min=1e-12)).sqrt().item()
    expect(
        mean_square <= tolerance.mean_square,
        f"{what}: relative root mean square error is {mean_square:.2e}, must be at most {tolerance.mean_square:.0e}",
    )
