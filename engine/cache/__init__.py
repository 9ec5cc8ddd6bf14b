"""The state of sequences between steps: KV caches, and the prefix cache on top of them."""
