"""Kernels on packed weights: one interface, a plain torch reference, back ends for CPUs and GPUs."""
