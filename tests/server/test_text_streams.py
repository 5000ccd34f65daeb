"""Pieces of text, joined, are the text of the whole; and no piece ends within a character."""

from pathlib import Path

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.server.tokenization.byte_tokenizer import END_TOKEN_ID, ByteTokenizer
from sagellm.server.tokenization.folder_tokenizer import FolderTokenizer
from sagellm.server.tokenization.tokenizer import Tokenizer, TokenizerError

_TEXT = st.text(max_size=40) | st.lists(st.sampled_from(small_tokenizers.TEXTS), max_size=2).map(" ".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: FolderTokenizer(small_tokenizers.save(make(), folder / name))
        for name, make in small_tokenizers.FAMILIES.items()
    }


def _streamed(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int], skip_special_tokens: bool) -> list[str]:
    """The text's pieces, tokens pushed so many at a time."""
    stream = tokenizer.text_stream(skip_special_tokens)
    pieces, start = [], 0
    for size in [*sizes, len(token_ids)]:
        pieces.append(stream.push(token_ids[start : start + size]))
        start = min(start + size, len(token_ids))
    return [*pieces, stream.flush()]


_SIZES = st.lists(st.integers(0, 3), max_size=80)


@pytest.mark.parametrize("family", list(small_tokenizers.FAMILIES))
@settings(max_examples=60, deadline=None)
@given(text=_TEXT, sizes=_SIZES)
def test_text_comes_out_of_a_stream_as_out_of_the_library(
    tokenizers: dict[str, FolderTokenizer], family: str, text: str, sizes: list[int]
) -> None:
    tokenizer = tokenizers[family]
    token_ids = tokenizer.encode(text, add_special_tokens=True)
    pieces = _streamed(tokenizer, token_ids, sizes, skip_special_tokens=True)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), sizes=_SIZES, skip=st.booleans())
def test_any_ids_come_out_of_a_byte_level_stream_as_out_of_the_library(
    tokenizers: dict[str, FolderTokenizer], data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    """Models draw tokens that no text has: halves of characters, specials, ids beyond the vocabulary."""
    tokenizer = tokenizers["byte_level"]
    token_ids = data.draw(st.lists(st.integers(0, 420), max_size=60))
    pieces = _streamed(tokenizer, token_ids, sizes, skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("family", ["byte_fallback", "metaspace"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=_SIZES)
def test_any_words_come_out_of_a_stream_as_out_of_the_library(
    tokenizers: dict[str, FolderTokenizer], family: str, data: st.DataObject, sizes: list[int]
) -> None:
    """Specials amid words must not eat the space behind them."""
    tokenizer = tokenizers[family]
    is_byte = [tokenizer.token_name(token_id).startswith("<0x") for token_id in range(600)]
    words = [token_id for token_id in range(600) if tokenizer.token_name(token_id) and not is_byte[token_id]]
    token_ids = data.draw(st.lists(st.sampled_from(words), max_size=40))
    pieces = _streamed(tokenizer, token_ids, sizes, skip_special_tokens=True)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_bytes_that_never_become_a_character_do_not_pile_up(tokenizers: dict[str, FolderTokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    byte = next(token_id for token_id in range(600) if tokenizer.token_name(token_id) == "<0xE4>")
    stream = tokenizer.text_stream(True)
    texts = [stream.push([byte]) for _ in range(1000)]
    assert "".join(texts).count("\ufffd") > 900


@settings(max_examples=40, deadline=None)
@given(text=_TEXT, sizes=_SIZES)
def test_no_piece_ends_within_a_character(tokenizers: dict[str, FolderTokenizer], text: str, sizes: list[int]) -> None:
    for tokenizer in (*tokenizers.values(), ByteTokenizer()):
        token_ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
        if any(tokenizer.token_name(token_id) == "<unk>" for token_id in token_ids):
            continue
        assert not any("\ufffd" in piece for piece in _streamed(tokenizer, token_ids, sizes, True))


@settings(deadline=None)
@given(data=st.binary(max_size=60), sizes=_SIZES)
def test_bytes_come_out_of_the_byte_tokenizer_as_python_decodes_them(data: bytes, sizes: list[int]) -> None:
    pieces = _streamed(ByteTokenizer(), [*data, END_TOKEN_ID, 300], sizes, skip_special_tokens=True)
    assert "".join(pieces) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(text=st.text())
def test_the_byte_tokenizer_takes_every_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True), skip_special_tokens=True) == text


@pytest.mark.parametrize("family", list(small_tokenizers.FAMILIES))
def test_token_bytes_joined_are_the_text(tokenizers: dict[str, FolderTokenizer], family: str) -> None:
    """What log-probabilities say of single tokens; decoders that strip spaces do so for each token alone, too."""
    tokenizer = tokenizers[family]
    token_ids = tokenizer.encode(small_tokenizers.TEXTS[0], add_special_tokens=False)
    joined = b"".join(map(tokenizer.token_bytes, token_ids)).decode()
    assert joined.replace(" ", "") == small_tokenizers.TEXTS[0].replace(" ", "")


def test_the_ends_of_answers_are_those_of_all_files(tmp_path: Path) -> None:
    folder = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert FolderTokenizer(folder).eos_token_ids == (1, 7, 9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: cannot be read: No such file or directory"),
        ("tokenizer.json", "{}", "tokenizer.json: the tokenizers library cannot read it"),
        ("tokenizer_config.json", '{"chat_template": 7}', "tokenizer_config.json: Expected"),
        ("generation_config.json", "{", "generation_config.json: Input data was truncated"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        FolderTokenizer(folder)
