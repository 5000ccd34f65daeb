"""The interface of a strategy."""

from sagellm.control_plane.queued_request import QueuedRequest, QueueOutlook


class Strategy:
    """A queue that says who is next. It owns its requests until they are removed."""

    def __len__(self) -> int:
        raise NotImplementedError

    def push(self, request: QueuedRequest) -> None:
        """The request is to wait."""
        raise NotImplementedError

    def next(self, outlook: QueueOutlook) -> QueuedRequest | None:
        """Who is to be served next; the request stays in the queue. None: the queue is empty."""
        raise NotImplementedError

    def served(self, request: QueuedRequest) -> None:
        """The request given by `next` is on its way to an instance."""
        raise NotImplementedError

    def remove(self, request: QueuedRequest) -> None:
        """The request, which is in the queue, leaves it for another reason."""
        raise NotImplementedError
