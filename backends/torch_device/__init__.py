"""Backends on torch: what all devices that torch knows have in common."""
