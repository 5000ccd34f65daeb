"""The CPU as a backend: always there, and the reference for all others."""
