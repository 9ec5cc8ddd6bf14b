"""Kernels on packed weights: one interface, a plain torch judge, back ends for processors and GPUs."""
