"""A registry that speaks the OCI distribution API: packages are valid images.

address.py       URL -> repositories and tags
image.py         manifest.json -> layers, config, image manifest; pure
tar.py           tar headers; pure
documents.py     descriptors, manifests, indexes
auth.py          credentials and tokens
transport.py     HTTP: retries, redirects, errors
distribution.py  the API of one repository
upload.py        a large blob, streamed
content.py       a layer's bytes, read from a package
record.py        digests of layers that were uploaded
tagged.py        change what a tag names, and notice who else did
referrers.py     statements
channels.py      channel pointers and the log of moves
publish.py       the order in which a package becomes visible
store.py         all of it as a store
"""

from pipeline.registry.stores.oci.store import OciStore

__all__ = ["OciStore"]
