"""Low precision: which form each target is given, and how its scales are found. Never torch."""
