"""The tokeniser in a model's folder: ``tokenizer.json``, and what the files beside it say of special tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer as FastTokenizer

from sagellm.server.tokenization.byte_alphabet import bytes_of_token
from sagellm.server.tokenization.chat_template import ChatTemplate
from sagellm.server.tokenization.text_streams import ByteTextStream, TextStream, WindowTextStream
from sagellm.server.tokenization.tokenizer import TokenizerError

_Config = TypeVar("_Config", bound=msgspec.Struct)


class _AddedToken(msgspec.Struct):
    content: str = ""


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None


class _ModelConfig(msgspec.Struct):
    """Of ``config.json`` and ``generation_config.json``."""

    eos_token_id: int | list[int] | None = None


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


class FolderTokenizer:
    """A Hugging Face "fast" tokeniser.

    Raises TokenizerError where the folder's files are missing or cannot be read.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        path = folder / "tokenizer.json"
        content = _read(path)
        try:
            self._fast = FastTokenizer.from_buffer(content)
        except ValueError as error:
            raise TokenizerError(f"{path}: the tokenizers library cannot read it: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        decoder = _decoded(path, content, _TokenizerFile).decoder or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        added = self._fast.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes_by_id: dict[int, bytes] = {}
        config = _config(folder / "tokenizer_config.json", _TokenizerConfig)
        self._special_tokens = _special_tokens(config)
        self._chat_template = ChatTemplate(chat_template or _template_text(folder, config), self._special_tokens)
        self._eos_token_ids = self._find_eos(folder)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def chat_template(self) -> ChatTemplate:
        return self._chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of the text."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of the ids."""
        return str(self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for by itself."""
        found = self._bytes_by_id.get(token_id)
        if found is None:
            if self._is_byte_level:
                found = bytes_of_token(self._fast.id_to_token(token_id) or "")
            else:
                found = self.decode((token_id,), skip_special_tokens=False).encode("utf-8")
            self._bytes_by_id[token_id] = found
        return found

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._fast.id_to_token(token_id) or ""

    def text_stream(self, skip_special_tokens: bool) -> TextStream:
        """A decoder of one answer."""
        if self._is_byte_level:
            return ByteTextStream(self._text_bytes if skip_special_tokens else self.token_bytes)
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return WindowTextStream(lambda ids: self.decode(ids, skip_special_tokens), skipped)

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def _find_eos(self, folder: Path) -> tuple[int, ...]:
        """The tokeniser's own, then those of the model's configurations, each once."""
        found: list[int] = []
        own = self._fast.token_to_id(self._special_tokens.get("eos_token", ""))
        if own is not None:
            found.append(own)
        for name in ("generation_config.json", "config.json"):
            ids = _config(folder / name, _ModelConfig).eos_token_id
            found.extend([ids] if isinstance(ids, int) else ids or ())
        return tuple(dict.fromkeys(found))


def _special_tokens(config: _TokenizerConfig) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token: str | _AddedToken | None = getattr(config, name)
        if token is not None:
            tokens[name] = token.content if isinstance(token, _AddedToken) else token
    return tokens


def _template_text(folder: Path, config: _TokenizerConfig) -> str | None:
    """A file of its own goes before the configuration's entry; of several there, the one named default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return _read(path).decode("utf-8")
    templates = config.chat_template
    if isinstance(templates, list):
        return next((each.template for each in templates if each.name == "default"), None)
    return templates


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error


def _config(path: Path, kind: type[_Config]) -> _Config:
    """A configuration file, or an empty one where there is none."""
    return _decoded(path, _read(path), kind) if path.exists() else kind()


def _decoded(path: Path, content: bytes, kind: type[_Config]) -> _Config:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error
