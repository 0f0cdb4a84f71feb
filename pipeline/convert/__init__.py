"""From the unified FP8 checkpoint to what a compiler reads."""
