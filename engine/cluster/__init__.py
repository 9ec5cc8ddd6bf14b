"""A model in parts on several machines, driven by one engine."""
