"""What leaves Python behind: engines and kernels for other runtimes."""
