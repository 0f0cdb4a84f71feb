"""Enginesmith: from a Hugging Face model to a checked, published, quantized inference engine."""

__version__ = "0.1.0"
