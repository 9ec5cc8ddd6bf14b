"""What a machine has and how fast it is: detected, measured, or read from a profile."""
