"""Checkpoints: pickle-free, atomic, verified, readable by any number of processes. docs/checkpoints.md is the format.

Knows tensors, JSON and folders; what of a run goes into one is decided in ``scaletrain.run``.
"""
