"""Unified FP8 checkpoint -> TensorRT-LLM 1.2 checkpoint: `config.json` and `rank0.safetensors`."""
