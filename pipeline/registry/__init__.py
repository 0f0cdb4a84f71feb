"""Packages, the references that name them, and the registries that they are published to.

Nothing here imports torch or any other builder's library.
"""
