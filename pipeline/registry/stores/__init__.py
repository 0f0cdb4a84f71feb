"""Where packages lie: a folder, S3, an OCI registry; bytes in, bytes out.

    store.py    the Protocol, and the values that it deals in
    opening.py  a URL -> its store or registry
    folder.py   the tree of pipeline.registry.folder
    s3.py       the same tree as objects
    oci/        a package as a valid image

Nothing here believes what it reads: digests and signatures are checked by those who ask.
"""
