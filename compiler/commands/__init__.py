"""The commands of `memcompile`, one file each; `compiler/cli.py` gathers them."""
