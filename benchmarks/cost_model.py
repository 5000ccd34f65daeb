"""How fast profiles load and steps are priced. ``python benchmarks/cost_model.py``"""

import time
from collections.abc import Callable

from backends.profile_files import list_profiles, load_profile
from sagellm.cost_model.factory import make_step_cost_model
from sagellm.cost_model.profile import FittedProfile
from sagellm.cost_model.step_cost import StepFeatures
from sagellm.models.known_models import load_model

REPEATS = 7


def best_us(call: Callable[[], object], calls: int) -> float:
    """Best of several rounds, in microseconds a call."""
    rounds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return min(rounds)


def main() -> None:
    model = load_model("Qwen/Qwen2.5-7B")
    print(f"{'profile':<32}{'load ms':>9}{'compile ms':>12}{'decode us':>11}{'mixed us':>10}")
    for name in list_profiles():
        profile = load_profile(name)
        target = profile.model if isinstance(profile, FittedProfile) else model
        cost_model = make_step_cost_model(profile, target)
        decode = StepFeatures(40, 40_000)
        mixed = StepFeatures(40, 40_000, ((900, 0),))
        load_ms = best_us(lambda n=name: load_profile(n), 3) / 1e3
        compile_ms = best_us(lambda p=profile, t=target: make_step_cost_model(p, t), 3) / 1e3
        decode_us = best_us(lambda c=cost_model, f=decode: c.step_cost(f), 20_000)
        mixed_us = best_us(lambda c=cost_model, f=mixed: c.step_cost(f), 20_000)
        print(f"{name:<32}{load_ms:>9.2f}{compile_ms:>12.2f}{decode_us:>11.2f}{mixed_us:>10.2f}")


if __name__ == "__main__":
    main()
