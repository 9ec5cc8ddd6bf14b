"""Answers bound to grammars: what they must look like, and which tokens may come next."""
