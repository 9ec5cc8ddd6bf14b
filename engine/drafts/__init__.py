"""Drafts: tokens guessed ahead, that a step computes along with the one it is for."""
