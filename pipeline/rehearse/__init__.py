"""The whole line on random weights: what a recipe would do, checked before any download."""
