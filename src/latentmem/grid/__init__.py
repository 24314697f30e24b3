"""A grid: many runs from one file, and the one table that compares them."""
