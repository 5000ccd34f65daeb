"""Where a server is: its address as a user writes it, and what goes with every request."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit


class ServerUnusableError(Exception):
    """The server cannot be measured: nobody listens, or it refuses. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server. ``base_url`` ends before ``/v1``."""

    base_url: str
    api_key: str | None = field(default=None, repr=False)

    def url(self, path: str) -> str:
        return f"{self.base_url}{path}"

    def headers(self) -> dict[str, str]:
        """Of every request. Answers come as they are: to unpack them would be work in the measured time."""
        headers = {"Accept-Encoding": "identity"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def parse_base_url(text: str) -> str:
    """``http://HOST:PORT``, with or without ``/v1`` or a slash at its end, in one form.

    Raises:
        ValueError: it is no address of a server.
    """
    shape = "write http://HOST:PORT"
    try:
        parts = urlsplit(text.strip())
        _ = parts.port  # parsed, and found wrong, on access only
    except ValueError as error:
        raise ValueError(f"{text!r} is not the address of a server ({error}); {shape}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not the address of a server; {shape}")
    if parts.query or parts.fragment:
        raise ValueError(f"{text!r} has a query or a fragment, which no server's address has; {shape}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
