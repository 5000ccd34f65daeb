"""Small models with unusual heads, and what transformers makes of a few prompts with them."""

import json
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 509
NUM_POSITIONS = 16384
NUM_OUTPUT_TOKENS = 24
PROMPT_LENS = (1, 5, 17, 33, 60, 100)
# Two tokens whose logits are closer than this, in deviations of all logits, may be told apart either way.
CLOSE_BY_DTYPE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True, slots=True)
class SmallModel:
    """One layout of heads. ``in_kernels``: the CUDA kernels know it."""

    name: str
    family: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    in_kernels: bool = True


SMALL_MODELS = (
    SmallModel("7 heads of 80 to 1", "llama", 7, 1, 80, "float32", 16),
    SmallModel("12 heads of 96 to 1", "qwen3", 24, 2, 96, "bfloat16", 24),
    SmallModel("2 heads of 256 to 1", "llama", 4, 2, 256, "float16", 16),
    SmallModel("2 heads of 512 to 1", "qwen3", 2, 1, 512, "float32", 16, in_kernels=False),
    SmallModel("128 heads of 128 to 1", "llama", 128, 1, 128, "float32", 16, in_kernels=False),
)


@dataclass(frozen=True, slots=True)
class Expected:
    """Greedy outputs of the prompts, and how much likelier each token was than the next best."""

    prompts: list[list[int]]
    outputs: list[list[int]]
    gaps: list[list[float]]  # in deviations of all logits at that place

    def num_differing(self, outputs: list[list[int]], close: float) -> int:
        """Outputs that leave the expected ones elsewhere than where two tokens were as good."""
        num_found = 0
        for expected, gaps, found in zip(self.outputs, self.gaps, outputs, strict=True):
            pairs = zip(expected, found, strict=False)
            first = next((place for place, (wanted, drawn) in enumerate(pairs) if wanted != drawn), None)
            num_found += len(found) != len(expected) or (first is not None and gaps[first] > close)
        return num_found


def folder_of(model: SmallModel, folder: Path) -> Path:
    return folder / model.name.replace(" ", "_")


def read_expected(model: SmallModel, folder: Path) -> Expected:
    return Expected(**json.loads((folder_of(model, folder) / "expected.json").read_text(encoding="utf-8")))


def make_models(folder: Path, device: str) -> None:
    """Save all models under ``folder``, each with what is expected of it."""
    for model in SMALL_MODELS:
        _make(model, folder_of(model, folder), device)


def _make(model: SmallModel, folder: Path, device: str) -> None:
    import torch
    import transformers

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": model.num_heads << (512 // model.num_heads).bit_length() - 1,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": NUM_POSITIONS,
        "initializer_range": 0.08,  # so that layers matter, and logits of 16 bits are told apart
        "tie_word_embeddings": False,
        "dtype": getattr(torch, model.dtype),
    }
    config_class = transformers.LlamaConfig if model.family == "llama" else transformers.Qwen3Config
    torch.manual_seed(1)
    made = transformers.AutoModelForCausalLM.from_config(config_class(**sizes), attn_implementation="eager")
    made = made.to(getattr(torch, model.dtype)).eval()
    made.save_pretrained(folder)
    made.to(device)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    outputs, gaps = [], []
    for prompt in prompts:
        tokens, found, cache, new = [], [], None, list(prompt)
        for _ in range(NUM_OUTPUT_TOKENS):
            with torch.inference_mode():
                out = made(torch.tensor([new], device=device), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            best = logits.topk(2)
            found.append(float((best.values[0] - best.values[1]) / logits.std()))
            new = [int(best.indices[0])]
            tokens += new
        outputs.append(tokens)
        gaps.append(found)
    expected = {"prompts": prompts, "outputs": outputs, "gaps": gaps}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
