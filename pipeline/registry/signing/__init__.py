"""Who made a package, and whom this machine believes.

    keys.py             ECDSA P-256 key pairs: made, chosen, read
    certificate.py      whose a key is: chains of certificates, read and judged
    envelope.py         DSSE envelopes: bytes with a signature
    model_signature.py  OpenSSF model signature over `engine/`, for other people's verifiers
    attestations.py     SLSA provenance and in-toto test result, as plain values
    trust.py            the policy: who may sign what, what is revoked
    policy_file.py      the policy as a file
    signer.py           sign a package, add the signature beside it
    verification.py     check a package, its signatures and its verdicts against the policy
    command.py          what `enginesmith keygen` and `enginesmith verify` do

The envelope over the bytes of `manifest.json` is what counts: the manifest names the SHA-256 of
every file, so it covers the whole package. Checking it needs the light install only. The model
signature says the same of `engine/` alone, where the stock `model_signing` tool looks for it.
"""
