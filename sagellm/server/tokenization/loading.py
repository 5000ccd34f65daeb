"""Which tokeniser a server uses."""

from pathlib import Path

from sagellm.server.tokenization.byte_tokenizer import ByteTokenizer
from sagellm.server.tokenization.tokenizer import Tokenizer


def load_tokenizer(folder: Path | None, chat_template: str | None = None) -> Tokenizer:
    """The tokeniser in a model's folder; without a folder, the byte tokeniser.

    Raises TokenizerError where the folder's files are missing or cannot be read.
    """
    if folder is None:
        return ByteTokenizer(chat_template)
    from sagellm.server.tokenization.folder_tokenizer import FolderTokenizer

    return FolderTokenizer(folder, chat_template)
