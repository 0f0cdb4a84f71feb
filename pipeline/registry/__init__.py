"""Packages, references and the folder they are published to."""
