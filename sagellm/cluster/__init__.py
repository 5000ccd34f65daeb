"""Cluster files: what stands where, and what it must keep. One file serves simulation and serving."""
