"""A registry that speaks the OCI distribution API: packages are valid images.

registry.py      settings, and the store that they open
address.py       URL -> repositories and tags
image.py         manifest.json -> layers, config, image manifest; pure
tar.py           tar headers; pure
documents.py     descriptors, manifests, indexes
auth.py          credentials and tokens
transport.py     HTTP: retries, redirects, errors
distribution.py  the API of one repository
content.py       a layer's bytes, read from a package
upload.py        a large blob, streamed
store.py         all of it as a store
"""
