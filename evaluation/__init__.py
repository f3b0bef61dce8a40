"""Evaluation: what a memory costs in quality, measured so that it cannot flatter."""
