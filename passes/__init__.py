"""Graph to graph: one file a pass, the file named after its function."""
