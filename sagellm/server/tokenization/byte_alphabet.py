"""How byte-level BPE spells bytes: each as one printable character (the GPT-2 vocabulary's convention)."""


def _byte_by_character() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(0x100 + i): value for i, value in enumerate(others)}


_BYTE_BY_CHARACTER = _byte_by_character()


def bytes_of_token(token: str) -> bytes:
    """The bytes that a token spells; a token with other characters, an added one, is its own UTF-8."""
    try:
        return bytes([_BYTE_BY_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
