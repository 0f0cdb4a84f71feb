"""Who made a package, what was stated about it, and whom this machine trusts.

A package counts if a trusted key signed a statement that names its digest: the manifest whose
SHA-256 that is names the SHA-256 of every file, so the statement covers the whole package.

    keys.py             ECDSA P-256 key pairs: made, chosen, read
    envelope.py         DSSE envelopes: bytes with a signature
    policy.py           the policy: who may sign what, what is revoked
    statements.py       what is signed: signatures, provenance, test results, yanks, moves
    provenance.py       SLSA provenance, as plain values
    model_signature.py  OpenSSF model signature over `engine/`, for other people's verifiers
    signatory.py        what this machine signs with, and whom it trusts
    verification.py     which statements about a package count, and whether it may be used
    channels.py         chains of signed moves

Nothing here knows how a store keeps things.
"""
