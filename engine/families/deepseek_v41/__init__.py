"""DeepSeek-V4.1: configuration, tensors, weights, placement, forward."""
