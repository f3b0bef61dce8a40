"""Puts the helpers beside it (kernel_case) on the import path of the targets' tests."""
