"""Packages, the references that name them, and the registries that they are published to.

    reference.py   what users type: `smollm2:candidate`; versions that follow from the manifest
    manifest.py    `manifest.json`, whose digest names a package; a folder verified against it
    package.py     seal a folder into a package; where it may be published
    store.py       what every store can do; stores/: a folder, S3, OCI
    trust/         statements: everything signed; which of them count
    resolve.py     a reference -> a verified package; select.py: the best one for this machine
    promotion.py   channels, yanks, copies
    inventory.py   list versions, and remove what nothing needs
    client/        pull and verify

Nothing here imports torch or any other builder's library.
"""
