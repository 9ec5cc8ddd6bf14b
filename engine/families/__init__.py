"""Model families: one interface, a registry, and a folder for each architecture."""
