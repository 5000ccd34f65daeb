"""Finds a model's folder: a local one, or a snapshot from the Hugging Face Hub."""

from pathlib import Path

_WANTED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
_OTHER_FORMS = ["consolidated*", "original/*"]  # the same weights once more


def model_folder(model: str) -> Path:
    """The folder of a model: ``model`` itself where it is one, else the Hub id's snapshot, fetched if need be.

    Raises ``ValueError``, one sentence, where it is neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED_FILES, ignore_patterns=_OTHER_FORMS))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model: {model!r} is no folder, and the Hub did not give it ({reason:.200}); "
            "give a folder with config.json and safetensors, the id of a model that can be reached, or "
            "--load-format dummy for random weights where the shape is known"
        ) from error
