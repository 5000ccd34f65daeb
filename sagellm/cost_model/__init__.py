"""Cost models: pure functions from a step's features to time, and from bytes and a link to time."""
