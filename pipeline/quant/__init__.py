"""Calibration and FP8 with ModelOpt; the result is checked tensor by tensor."""
