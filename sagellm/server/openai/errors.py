"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}``, code = HTTP status."""

import msgspec


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that gets no answer, and why. ``param`` names the field at fault; ``retry_after_s`` may help."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def encoded(self) -> bytes:
        """The error as JSON."""
        return error_body(self.status, self.message, self.param)


def invalid(param: str | None, message: str) -> ApiError:
    """The request itself is wrong: 400."""
    return ApiError(400, message, param)


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """JSON of the error with that HTTP status."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(message, error_type(status), param, status)))


def error_type(status: int) -> str:
    if status in _TYPES:
        return _TYPES[status]
    return "BadRequestError" if status < 500 else "InternalServerError"
