"""Text to token ids and back, whole or piece by piece, and messages to a prompt."""
