"""Executes TensorRT-RTX engines on their card, in a process of their own."""
