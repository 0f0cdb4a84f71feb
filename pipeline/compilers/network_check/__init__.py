"""Checks that the compiler was handed the graph that we wrote."""
