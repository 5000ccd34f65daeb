"""From a profile and a model to the cost model that prices the model's steps."""

from sagellm.cost_model.analytic import compile_price_table
from sagellm.cost_model.price_table import TabulatedStepCost
from sagellm.cost_model.profile import AnalyticProfile, FittedProfile, Profile
from sagellm.models.model_shape import ModelShape


def make_step_cost_model(profile: Profile, model: ModelShape, tp: int = 1) -> TabulatedStepCost:
    """Compiles the profile for ``model`` on ``tp`` devices. A ``StepCostModel``.

    Raises ``ValueError`` where ``tp`` does not divide the model's heads, or a fitted profile was fitted
    to another model or number of devices.
    """
    if isinstance(profile, FittedProfile):
        if not profile.is_for(model, tp):
            raise ValueError(
                f"profile {profile.header.name} was fitted to {profile.model.name} at tp {profile.tp}, "
                f"not to {model.name} at tp {tp}; use a profile family or a spec profile for that"
            )
        return TabulatedStepCost(profile.table, profile.header.status, profile.request_overhead_ns)
    table = compile_price_table(profile, model, tp)
    return TabulatedStepCost(table, profile.header.status, profile.host.request_overhead_ns)


def describe_profile(profile: Profile, model: ModelShape, tp: int = 1) -> str:
    """One line for reports: what prices the steps, how it came to its numbers, and how far to trust it."""
    header = profile.header
    kind = "fitted" if isinstance(profile, FittedProfile) else "analytic"
    error = f"; fit error: {header.fit_error}" if header.fit_error else ""
    return (
        f"{header.name} ({header.status}, {kind}): {model.name} on {tp} x {header.hardware}, {header.engine}, "
        f"{header.date}{error}"
    )


def plan_lead_ns(profile: Profile) -> int:
    """How long before the end of a step the profile's engine plans the next one; 0: as soon as it can."""
    return profile.plan_lead_ns if isinstance(profile, FittedProfile) else 0


def steps_in_flight_max(profile: Profile) -> int:
    """How many steps the profile's engine keeps in flight; 2 with asynchronous scheduling."""
    return profile.host.steps_in_flight_max if isinstance(profile, AnalyticProfile) else profile.steps_in_flight_max
