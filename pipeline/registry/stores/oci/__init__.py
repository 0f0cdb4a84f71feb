"""A registry that speaks the OCI distribution API: packages are valid images."""
