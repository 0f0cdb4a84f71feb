"""Who made a package, what was stated about it, and whom this machine trusts.

A package counts if a trusted key signed a statement that names its digest: the manifest whose
SHA-256 that is names the SHA-256 of every file, so the statement covers the whole package.
"""
