"""TensorRT-LLM engines: the command, where it runs, and the proof that it did what was asked."""
