"""The unified checkpoint itself, for vLLM and SGLang."""
