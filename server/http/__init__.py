"""What surrounds every request: connections, identity, limits, logs and errors."""
