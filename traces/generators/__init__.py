"""Traces made from published statistics, by name, of any length, rate and seed.

Each generator says in its module where its numbers come from; ``traces.catalog`` lists them.
"""

from traces.generators.generate import generate

__all__ = ["generate"]
