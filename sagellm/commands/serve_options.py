"""The command line of ``sagellm serve``."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user said; None and 0 where nothing."""

    cluster: str | None
    model: str | None
    load_format: str
    dtype: str
    seed: int
    tokenizer: Path | None
    chat_template: Path | None
    model_names: tuple[str, ...]
    host: str
    port: int
    api_keys: tuple[str, ...]
    log_path: Path | None
    grace_s: float
    single_process: bool
    backend: str | None
    num_threads: int
    trust_request_chat_template: bool
