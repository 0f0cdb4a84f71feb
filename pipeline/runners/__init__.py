"""What executes a graph or a model: one decode loop, several runtimes."""
