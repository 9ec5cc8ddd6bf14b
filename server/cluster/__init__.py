"""A model on several machines, by Ray. Nothing outside of this folder imports Ray."""
