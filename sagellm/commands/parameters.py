"""Option values with units."""

import click

from sagellm.core.request import LatencySLO


class SLOParameter(click.ParamType):
    """``ttft=500ms,tpot=50ms``."""

    name = "slo"

    def convert(self, value: str | LatencySLO, param: click.Parameter | None, ctx: click.Context | None) -> LatencySLO:
        from sagellm.cluster.quantities import parse_slo

        if isinstance(value, LatencySLO):
            return value
        try:
            return parse_slo(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
