"""Kernels for NVIDIA GPUs, one to a file; importing one needs triton."""
