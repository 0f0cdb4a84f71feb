"""A registry that speaks the OCI distribution API: packages are valid images.

registry.py      settings, and the store that they open
address.py       URL -> repositories and tags
image.py         manifest.json -> tar layers, config, image manifest
documents.py     descriptors, manifests, lists
auth.py          credentials and tokens
transport.py     HTTP: retries, redirects, errors
distribution.py  the API of one repository, uploads of large blobs included
store.py         all of it as a store
"""
