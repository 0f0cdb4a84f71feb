"""A store in S3: the tree of a folder registry as objects, readable by plain GETs.

    <prefix>/<name>/<variant>/<version>/manifest.json     the version is there iff this is
    <prefix>/<name>/<variant>/<version>/engine/...
    <prefix>/<name>/<variant>/<version>.claim             who writes it just now; gone afterwards
    <prefix>/<name>/<variant>/<version>.statements/       see `statements`
    <prefix>/<name>/<variant>/channels/<channel>.<card>.json
    <prefix>/<name>/<variant>/channels/log/<file>

    store.py       settings, and the methods of the Protocol
    connection.py  the boto3 client: credentials come from its chain, and from nowhere else
    address.py     URL -> bucket and keys
    faults.py      what botocore raises -> errors that say what to do
    bucket.py      single requests
    claim.py       who may write a version
    upload.py      files, in one pass; crc32.py puts checksums of parts together
    publish.py     the order in which a package comes to light
    statements.py  one object each
    reading.py     ranges of one and the same object
    removal.py     versions and leftovers go

Needs conditional writes (`If-None-Match`, `If-Match`), which `check_writable` tries. boto3 is
imported when a store is first asked for something.
"""

from __future__ import annotations

from pipeline.registry.stores.s3.store import S3Store

__all__ = ["S3Store"]
