"""Speed, memory and training comparisons of `txl_kernels` with the eager reference."""
