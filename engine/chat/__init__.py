"""Messages to token ids, and generated text back to messages: one format per prompt dialect."""
