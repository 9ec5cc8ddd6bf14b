"""From logits to tokens: parameters, defaults, truncation, the draw."""
