"""What runs inside a child process that holds a model; these files need nothing of this package."""
