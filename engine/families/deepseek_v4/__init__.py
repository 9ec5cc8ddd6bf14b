"""DeepSeek-V4: parallel streams, windows, compressed entries of each layer, experts chosen by token ids."""
