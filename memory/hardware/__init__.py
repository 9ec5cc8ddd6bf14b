"""A machine's resources and speeds: detected, measured, or read from a profile."""
