"""Runs and measures TensorRT-LLM engines: `trtllm-bench` for speed, its LLM class for tokens."""
