"""Who made a package, what was stated about it, and whom this machine trusts.

A package counts if a trusted key signed a statement that names its digest: the manifest whose
SHA-256 that is names the SHA-256 of every file, so the statement covers the whole package.

    policy.py        keys, read; who may sign what, what is revoked; whom this machine trusts
    statements.py    what is signed, read: signatures, provenance, test results, yanks, moves
    verification.py  which statements count, where channels point, whether a package may be used
    signing.py       makes keys, and all that this machine signs; a pull loads nothing of it
"""
