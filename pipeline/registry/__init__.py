"""Packages, the references that name them, and the registries that they are published to.

    reference.py   what users type: `smollm2:candidate`
    manifest.py    `manifest.json`: the facts and file digests whose own digest names a package
    package.py     seal a folder into a package; verify one
    statements.py  what was said about a package, and the channels that point to it
    backend.py     the Protocol that every registry implements
    folder.py      a registry in a folder

Nothing here imports torch or any other builder's library.
"""
