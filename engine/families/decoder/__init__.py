"""Llama and SmolLM2: configuration and forward."""
