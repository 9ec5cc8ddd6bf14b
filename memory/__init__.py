"""Where bytes live and how they move: checkpoints, tiers, placement and transfers."""
