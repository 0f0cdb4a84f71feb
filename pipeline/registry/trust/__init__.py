"""Who made a package, what was stated about it, and whom this machine trusts.

A package counts if a trusted key signed a statement that names its digest: the manifest whose
SHA-256 that is names the SHA-256 of every file, so the statement covers the whole package.

    keys.py          ECDSA P-256 keys: chosen, read
    policy.py        the policy: who may sign what, what is revoked; whom this machine trusts
    statements.py    what is signed, read: signatures, provenance, test results, yanks, moves
    verification.py  which statements about a package count, and whether it may be used
    channels.py      chains of signed moves, read
    signing.py       makes keys, and all that this machine signs; a pull loads nothing of it

Nothing here knows how a store keeps things.
"""
