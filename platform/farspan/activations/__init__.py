"""What a model keeps from forward for backward: tiled, moved to another tier, or computed again."""
