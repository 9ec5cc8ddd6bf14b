"""Around every request: connections, authentication, limits, logs and errors."""
