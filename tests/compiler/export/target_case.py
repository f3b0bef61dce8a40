"""The GPUs that tests compile kernels for."""

TARGETS = ("cuda:sm_80", "hip:gfx942")
