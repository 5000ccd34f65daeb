"""Models known by their Hugging Face Hub id. The configurations are facts of their public repositories."""

from importlib import resources
from pathlib import Path

from sagellm.models.config_file import parse_model_config, read_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.models.model_shape import ModelShape

# Hub id -> file of the shipped configuration. The instruction-tuned models have the same shape. Those of
# sagellm have no checkpoint: they are for random weights, small enough for a CPU.
_CONFIG_FILES = {
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "Qwen/Qwen2.5-14B": "qwen2.5-14b",
    "Qwen/Qwen2.5-32B": "qwen2.5-32b",
    "Qwen/Qwen2.5-72B": "qwen2.5-72b",
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b-v0.3",
    "facebook/opt-13b": "opt-13b",
    "facebook/opt-66b": "opt-66b",
    "sagellm/toy": "toy",
    "sagellm/qwen3-100m": "qwen3-100m",
}


def known_model_ids() -> tuple[str, ...]:
    return tuple(_CONFIG_FILES)


def load_model(name_or_path: str) -> ModelShape:
    """The shape of ``load_model_config``'s model, all that prices and memory need."""
    return load_model_config(name_or_path).shape


def load_model_config(name_or_path: str) -> ModelConfig:
    """A known model, or that of the ``config.json`` (or the folder that holds one) at a path.

    Case, the owner before the slash and an ``-Instruct``, ``-Base`` or ``-Chat`` ending make no difference
    for known models. Raises ``ValueError`` where the name is neither.
    """
    config_file = _config_file(name_or_path)
    if config_file is not None:
        text = resources.files("sagellm.models").joinpath("configs", f"{config_file}.json").read_text("utf-8")
        return parse_model_config(text, name_or_path, f"{config_file}.json")
    path = Path(name_or_path)
    if path.is_dir():
        return read_model_config(path / "config.json")
    if path.is_file():
        return read_model_config(path)
    raise ValueError(
        f"model: {name_or_path!r} is no known model and no config.json; known are {', '.join(_CONFIG_FILES)}"
    )


def _config_file(name: str) -> str | None:
    wanted = _canonical(name)
    for model_id, config_file in _CONFIG_FILES.items():
        if wanted in (_canonical(model_id), _canonical(model_id.split("/")[1])):
            return config_file
    return None


def _canonical(name: str) -> str:
    name = name.lower().replace("meta-llama-3.1", "llama-3.1")
    for ending in ("-instruct", "-base", "-chat"):
        name = name.removesuffix(ending)
        name = name.replace(f"{ending}-v", "-v")
    return name
