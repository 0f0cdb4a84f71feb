"""Workloads, measurements, and the pure judge."""
