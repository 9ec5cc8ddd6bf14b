"""Kernels for GPUs: Triton."""
