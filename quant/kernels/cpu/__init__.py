"""Kernels for processors: C++ behind ctypes."""
