"""Pull a package: choose it, verify it, fetch it, lay it out. Light: no torch, no NumPy."""
