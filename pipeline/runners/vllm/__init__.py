"""Executes checkpoint engines in vLLM, in a process of their own."""
