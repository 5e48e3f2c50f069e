"""`bitnet compare`: every way to shrink a model, on one trained pair."""
