"""What benchmarks/gpu.py shows about one GPU, a module a section. Nothing here needs a GPU to be imported."""
