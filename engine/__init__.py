"""Token ids to token ids: model families, caches, scheduling, sampling, tokenizers and prompts."""
