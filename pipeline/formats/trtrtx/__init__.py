"""TensorRT-RTX engines, compiled from an ONNX decoder graph without a GPU."""
