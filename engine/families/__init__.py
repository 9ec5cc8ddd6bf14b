"""Model families: one interface, a registry, and a folder or file for each architecture."""
