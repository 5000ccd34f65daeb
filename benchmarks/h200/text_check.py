"""Greedy texts of a serving instance beside those of the eager path: operators launched, one batch, no graphs.

The two add in other orders, so texts may part where two tokens are about as likely. How far off logits of the model's
type are is measured: on rows of the eager path, against the same weights in float32. Where that is e, root mean
square, two logits in each of two paths differ by noise of 2 e, and texts that part at more than four times as
much, and more than four spacings of the type, part for another reason.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import torch

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.lowering.lower import lower
from backends.lowering.program import GraphProgram
from backends.operators.registry import KernelRegistry
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.instance_texts import InstanceTexts
from benchmarks.h200.paged_steps import Chunk, PagedSequences
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId
from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse

NOISE_FACTOR = 4 * 2  # deviations, of what has twice the noise of a logit
SPACINGS_ALWAYS = 4
NUM_NOISE_ROWS = 8
BLOCK_SIZE = 16
PROMPT_LENGTHS = (16, 256)
EAGER_PATHS = ("own kernels", "reference operators")


@dataclass(frozen=True, slots=True)
class Parting:
    """The first token in which two texts differ."""

    prompt: int
    token: int
    gap: float  # by how much the eager path's logit of its own token is above that of the other
    spacings: float  # the same, in spacings of the type at the size of that logit
    is_close: bool  # the model's type cannot tell


@dataclass(frozen=True, slots=True)
class TextCheck:
    """One model against one eager path."""

    model: str
    eager: str
    num_texts: int
    num_tokens: int  # of each text
    num_different_tokens: int  # that occur in the eager path's texts: how much their equality says
    noise: float  # of a logit in the model's type
    partings: tuple[Parting, ...]

    @property
    def num_equal(self) -> int:
        return self.num_texts - len(self.partings)

    @property
    def num_close(self) -> int:
        return sum(parting.is_close for parting in self.partings)

    @property
    def is_kept(self) -> bool:
        return self.num_close == len(self.partings)

    def gaps(self) -> dict[int, int]:
        """How many texts part at a gap of so many spacings, rounded up."""
        return dict(sorted(Counter(math.ceil(parting.spacings) for parting in self.partings).items()))


@dataclass(frozen=True, slots=True)
class EagerTexts:
    """What the eager path makes of the prompts, and the logits of every step: [num_texts, vocab_size] each."""

    texts: list[list[int]]
    logits: list[torch.Tensor]


def check_texts(model: str, num_texts: int, num_tokens: int, backend: HardwareBackend) -> list[TextCheck]:
    """Against each eager path, with the same random weights."""
    config = load_model_config(model)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(config.shape.vocab_size) for _ in range(rng.randint(*PROMPT_LENGTHS))] for _ in range(num_texts)
    ]
    served = InstanceTexts(settings_of(model, num_texts, num_tokens, backend)).generate(prompts, num_tokens)
    with torch.inference_mode():
        eager = {path: eager_texts(path, config, prompts, num_tokens, backend) for path in EAGER_PATHS}
        noise = noise_of(config, prompts, eager["reference operators"], backend)
    return [compared(model, path, served, texts, noise, config.dtype) for path, texts in eager.items()]


def settings_of(model: str, num_texts: int, num_tokens: int, backend: HardwareBackend) -> ExecutorSettings:
    """Room for all at once; steps so small that prompts are computed in chunks, beside decodes."""
    blocks_each = -(-(PROMPT_LENGTHS[1] + num_tokens) // BLOCK_SIZE)
    instance = InstanceConfig(
        InstanceId("texts"),
        num_blocks=num_texts * blocks_each,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_texts,
        max_num_batched_tokens=max(512, num_texts),
        repeat_max=1,
    )
    return ExecutorSettings(instance=instance, model=model, backend=backend.name, load_format="dummy")


def eager_texts(
    path: str, config: ModelConfig, prompts: list[list[int]], num_tokens: int, backend: HardwareBackend
) -> EagerTexts:
    device = backend.torch_device(0)
    program = eager_program(path, config, backend)
    longest = max(map(len, prompts)) + num_tokens
    cache = PagedSequences(config, len(prompts), longest, device, BLOCK_SIZE)
    chunks = [Chunk(index, prompt, 0) for index, prompt in enumerate(prompts)]
    texts: list[list[int]] = [[] for _ in prompts]
    logits = []
    for _ in range(num_tokens):
        logits.append(program.run(cache.inputs(chunks, all_rows=False), cache.kv))
        drawn = logits[-1].argmax(-1).tolist()
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)
        chunks = [
            Chunk(index, [drawn[index]], len(prompt) + len(texts[index]) - 1) for index, prompt in enumerate(prompts)
        ]
    return EagerTexts(texts, logits)


def eager_program(path: str, config: ModelConfig, backend: HardwareBackend) -> GraphProgram:
    """With the weights that an instance makes up; in float32 these are the same, not others drawn finer."""
    device = backend.torch_device(0)
    graph = select_rows_early(fuse(build_graph(config)))
    weights = load_weights(graph, DummyWeights(device), rank=0, device=device, progress=NoProgress())
    if path == "float32":
        wide = {id(tensor): tensor.float() for tensor in weights.values()}
        graph = select_rows_early(fuse(build_graph(replace(config, dtype="float32"))))
        weights = {name: wide[id(tensor)] for name, tensor in weights.items()}
    kernels = KernelRegistry()
    if path == "own kernels":
        backend.register_operators(kernels)
    num_positions = config.max_model_len or 4096
    return lower(graph, weights, kernels=kernels, backend=backend.name, device=device, num_positions=num_positions)


def noise_of(config: ModelConfig, prompts: list[list[int]], eager: EagerTexts, backend: HardwareBackend) -> float:
    """How far logits of the model's type are off those in float32, root mean square, in the last step of some texts."""
    program = eager_program("float32", config, backend)
    contexts = [
        prompt + text[:-1] for prompt, text in zip(prompts[:NUM_NOISE_ROWS], eager.texts[:NUM_NOISE_ROWS], strict=True)
    ]
    wide = replace(config, dtype="float32")
    cache = PagedSequences(wide, len(contexts), max(map(len, contexts)), backend.torch_device(0), BLOCK_SIZE)
    chunks = [Chunk(index, context, 0) for index, context in enumerate(contexts)]
    exact = program.run(cache.inputs(chunks, all_rows=False), cache.kv)
    return float((eager.logits[-1][: len(contexts)] - exact).square().mean().sqrt())


def compared(model: str, path: str, served: list[list[int]], eager: EagerTexts, noise: float, dtype: str) -> TextCheck:
    """Raises ``ValueError`` where a text has not as many tokens as the other."""
    partings = []
    for prompt, (ours, theirs) in enumerate(zip(served, eager.texts, strict=True)):
        token = first_difference(ours, theirs)
        if token is not None:
            logits = eager.logits[token][prompt]
            best, other = float(logits[theirs[token]]), float(logits[ours[token]])
            partings.append(parting(prompt, token, best, other, noise, dtype))
    different = {token for text in eager.texts for token in text}
    return TextCheck(model, path, len(served), len(eager.logits), len(different), noise, tuple(partings))


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Raises ``ValueError`` where one is shorter."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (own, other) in pairs if own != other), None)


def parting(prompt: int, token: int, best: float, other: float, noise: float, dtype: str) -> Parting:
    spacing = torch.finfo(getattr(torch, dtype)).eps * 2.0 ** (math.frexp(best)[1] - 1)
    gap = best - other
    is_close = gap <= max(NOISE_FACTOR * noise, SPACINGS_ALWAYS * spacing)
    return Parting(prompt, token, gap, gap / spacing, is_close)
