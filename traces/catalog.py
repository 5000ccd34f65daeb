"""The generators by name, without loading them."""

from dataclasses import dataclass

from traces.errors import TraceError


@dataclass(frozen=True, slots=True)
class GeneratorDescription:
    """One line for a list of generators. ``default_rate_rps`` is in requests per second."""

    name: str
    description: str
    default_rate_rps: float
    parameters: tuple[str, ...] = ()  # keyword parameters of ``generate`` that this generator takes


_GENERATORS = (
    GeneratorDescription("azure-conv", "chat: medium prompts, slowly varying load (Azure 2023 conversation)", 5.53),
    GeneratorDescription("azure-code", "code completion: long in, short out, strong bursts (Azure 2023 code)", 2.57),
    GeneratorDescription("mooncake-conv", "chat sessions with long shared prefixes (Mooncake conversation)", 3.40),
    GeneratorDescription("mooncake-doc", "questions about documents, and short chats (Mooncake synthetic)", 3.91),
    GeneratorDescription("arxiv-summ", "summaries of papers: prompts up to 4k, Poisson arrivals (arXiv)", 1.0),
    GeneratorDescription("poisson", "Poisson arrivals, lengths of one's choice", 5.53, ("lengths",)),
    GeneratorDescription("gamma", "gamma arrivals of one's choice of CV and lengths", 5.53, ("lengths", "cv")),
)


def list_generators() -> tuple[GeneratorDescription, ...]:
    """All generators, in the order in which to show them."""
    return _GENERATORS


def find_generator(name: str) -> GeneratorDescription:
    """The generator of that name. Raises TraceError, with the names that there are."""
    for generator in _GENERATORS:
        if generator.name == name:
            return generator
    names = ", ".join(generator.name for generator in _GENERATORS)
    raise TraceError(f"{name!r} is not the name of a generator; there are {names}")
