"""What an executor says when it cannot be made or cannot do what it was asked for."""


class ExecutorError(ValueError):
    """A model, a device or a call does not fit the other two; the message is one sentence for a person."""
