"""Kernels for CPUs: C++ behind ctypes."""
