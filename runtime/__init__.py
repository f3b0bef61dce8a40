"""What runs beside a compiled graph: the engine and the state of its memories."""
