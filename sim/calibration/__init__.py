"""Fits cost models to measured steps: ``python -m sim.calibration fit --help``."""
