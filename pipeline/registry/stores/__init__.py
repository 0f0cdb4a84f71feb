"""Where packages lie: a folder, S3, an OCI registry; bytes in, bytes out.

    opening.py      a URL -> its store
    tree.py         a store over a tree of objects
    objects.py      what a tree of objects can do: folder.py, s3/
    oci/            a package as a valid image
    transfer.py     one deadline and one floor for everything that goes over a network

Nothing here believes what it reads: digests and signatures are checked above.
"""
