"""What the kernels' benchmarks share; not called `kernels`, as a package that transformers imports is."""
