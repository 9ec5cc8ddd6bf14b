"""Addresses that are reserved at once, and memory behind them that is taken and given back in pages."""
