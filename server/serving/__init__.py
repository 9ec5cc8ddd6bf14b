"""What all protocols share: the service, a request's sequences, its answer whole or as a stream."""
