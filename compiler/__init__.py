"""The road from a model file to a running engine: load, capture, plan, build, report."""
