"""The parts of benchmarks/gpu.py, each measured in a separate process.

timing.py     floors, CUDA graphs, medians, what the GPU is      products.py   GEMV and GEMM
decoding.py   tokens per second of the 2B4T shape                training.py   training steps
"""
