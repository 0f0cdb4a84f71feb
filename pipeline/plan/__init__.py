"""What follows from the recipe alone: does it fit, what is its ceiling, what is known to be bad."""
