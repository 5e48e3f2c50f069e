"""`bitnet sweep`: many runs from one spec, several seeds each, beside their float baselines."""
