"""Operator kernels in Triton. Each computes what its namesake in ``backends.operators.reference`` computes.

Importing a module of this package imports triton; ``TRITON_INTERPRET=1`` runs them on tensors of the CPU.
"""
