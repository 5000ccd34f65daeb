"""What the HTTP application is told, once, when it is made."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AppSettings:
    """The model as clients see it, and the limits of what they may ask for.

    Raises ValueError where a field cannot be right.
    """

    model_names: tuple[str, ...]  # names that requests may use; the first one is shown
    max_model_len: int  # prompt and output tokens of one request together
    vocab_size: int  # ids that the model knows: 0 to this less 1
    model_root: str = ""  # folder or Hub id that the weights came from; "": the first name
    tokenizer_folder: Path | None = None  # holds tokenizer.json; None: the byte tokeniser
    eos_token_ids: tuple[int, ...] = ()  # beside those that the tokeniser's own files name
    chat_template: str | None = None  # Jinja text instead of the model's own
    trust_request_chat_template: bool = False  # a template can burn the server's time
    api_keys: tuple[str, ...] = ()  # empty: anybody may ask
    body_bytes_max: int = 32 << 20
    header_bytes_max: int = 16 << 10
    logprobs_max: int = 20  # alternatives for one token
    num_choices_max: int = 128  # of one prompt (n)
    num_prompts_max: int = 1024  # of one request, each counted as often as it is answered
    num_stops_max: int = 16  # stop strings
    write_timeout_s: float = 30.0  # a client that reads nothing for so long is given up
    retry_after_s: int = 1  # told to clients that come to a full queue

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError(f"model_names: {self.model_names}, must be one name or more, none of them empty")
        for name in ("max_model_len", "vocab_size", "body_bytes_max", "header_bytes_max", "num_choices_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if not self.write_timeout_s > 0:
            raise ValueError(f"write_timeout_s: {self.write_timeout_s}, must be above 0")

    @property
    def model_name(self) -> str:
        return self.model_names[0]
