"""State that sequences keep between steps: kinds of KV cache, and the prefix cache over them."""
