"""Recorded steps on several devices."""
