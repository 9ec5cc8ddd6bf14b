"""Measuring the kernels against what the machine can do; `loci bench kernels` prints it."""
