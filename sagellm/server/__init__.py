"""Serving on real devices: the live driver of the machines, and the OpenAI-compatible endpoint before it."""
