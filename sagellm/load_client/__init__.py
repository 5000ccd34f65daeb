"""A client that sends a trace to a running server with the recorded timing, and measures what comes back."""
