"""Turns kernel specifications into source and loaded kernels."""
