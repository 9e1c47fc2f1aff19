"""The frozen base: makes it from float weights, stores it and measures it."""
