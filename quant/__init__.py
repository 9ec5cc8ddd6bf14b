"""Bits to numbers: packed formats, codecs, kernels and conversion. Knows nothing of tiers."""
