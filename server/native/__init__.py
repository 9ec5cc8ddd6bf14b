"""Loci's own routes: health, metrics, tokenizer."""
