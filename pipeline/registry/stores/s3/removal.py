"""Remove versions, and what interrupted runs left behind.

A removal takes the version's claim, so that nobody publishes it meanwhile; then the manifest goes,
and with it the version; then everything else, and the claim last. A removal that was stopped is
completed by the next one, or counts as a leftover after a day.

In a bucket that keeps old versions of objects, they stay until its own rules remove them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.core.errors import PipelineError, RecipeError
from pipeline.registry.manifest import MAX_MANIFEST_BYTES
from pipeline.registry.reference import STATEMENTS_SUFFIX, check_part
from pipeline.registry.stores.s3.bucket import Bucket, Found
from pipeline.registry.stores.s3.claim import REMOVAL, Claim
from pipeline.registry.stores.store import Place

PROBE = ".writable-"
_CLAIM_SUFFIX = ".claim"


@dataclass(kw_only=True)
class _Version:
    """The objects of one version.

    Attributes:
        place: Of which.
        published: Its manifest is there.
        objects: All others, the claim among them.
    """

    place: Place
    published: bool = False
    objects: list[Found] = field(default_factory=list)


def delete_version(bucket: Bucket, place: Place) -> int:
    """Remove a version with its statements; the bytes that this frees.

    Raises:
        TransientError: Somebody is publishing it just now.
    """
    published = bucket.read(bucket.address.manifest(place), MAX_MANIFEST_BYTES) is not None
    objects = list(_objects(bucket, place))
    if not objects:
        return 0
    claim = Claim(bucket=bucket, place=place, digest=REMOVAL)
    # Once the manifest is there, a publisher's claim has done its work.
    claim.take(**({"dead_s": 0.0} if published else {}))
    return _remove(bucket, claim)


def leftovers(bucket: Bucket, min_age_s: float, *, delete: bool) -> list[str]:
    """See `pipeline.registry.stores.store.WritableStore.leftovers`."""
    newest_s = bucket.now_s() - min_age_s
    root = bucket.address.root
    words = []
    for key, upload_id, begun_s in list(bucket.uploads(root)):
        if begun_s <= newest_s and _place_of(key.removeprefix(root)):
            words.append(f"{key.removeprefix(root)} (unfinished upload)")
            if delete:
                bucket.abort(key, upload_id)
    versions: dict[Place, _Version] = {}
    for found in bucket.listed(root):
        path = found.key.removeprefix(root)
        if path.startswith(PROBE) and found.modified_s <= newest_s:
            words.append(f"{path} (left by a check, {found.size_bytes} bytes)")
            if delete:
                bucket.delete(found.key)
        elif place := _place_of(path):
            version = versions.setdefault(place, _Version(place=place))
            if found.key == bucket.address.manifest(place):
                version.published = True
            else:
                version.objects.append(found)
    for version in versions.values():
        words += _leftovers_of(bucket, version, newest_s, min_age_s, delete=delete)
    return sorted(words)


def _leftovers_of(
    bucket: Bucket, version: _Version, newest_s: float, min_age_s: float, *, delete: bool
) -> Iterator[str]:
    claim_key = bucket.address.claim(version.place)
    root = bucket.address.root
    if version.published:
        for found in version.objects:
            if found.key == claim_key and found.modified_s <= newest_s:
                yield f"{found.key.removeprefix(root)} (claim of a finished run)"
                if delete:
                    bucket.delete(found.key)
        return
    if any(found.modified_s > newest_s for found in version.objects):
        return  # somebody is at work
    size_bytes = sum(found.size_bytes for found in version.objects)
    what = bucket.address.version(version.place).removeprefix(root)
    yield f"{what} (objects of a version that is not there, {size_bytes} bytes)"
    if delete:
        claim = Claim(bucket=bucket, place=version.place, digest=REMOVAL)
        claim.take(dead_s=min_age_s)
        if bucket.head(bucket.address.manifest(version.place)) is None:
            _remove(bucket, claim)
        else:  # published since we listed
            claim.release()


def _remove(bucket: Bucket, claim: Claim) -> int:
    """Remove all objects of a claimed version, the manifest first and the claim last."""
    place = claim.place
    manifest = bucket.address.manifest(place)
    if (found := bucket.head(manifest)) is not None:
        bucket.delete(manifest)
    freed = 0 if found is None else found.size_bytes
    for key, upload_id, _ in list(bucket.uploads(f"{bucket.address.version(place)}/")):
        bucket.abort(key, upload_id)
    for found in list(_objects(bucket, place)):
        if found.key == claim.key:
            continue
        claim.keep()
        bucket.delete(found.key)
        freed += found.size_bytes
    if (left := next(iter(bucket.listed(f"{bucket.address.version(place)}/")), None)) is not None:
        raise PipelineError(f"{bucket.url}: {left.key} cannot be removed; remove {place} again")
    claim.release()
    return freed


def _objects(bucket: Bucket, place: Place) -> Iterator[Found]:
    version = bucket.address.version(place)
    yield from bucket.listed(f"{version}/")
    yield from bucket.listed(bucket.address.statements(place))
    yield from (
        found
        for found in bucket.listed(bucket.address.claim(place))
        if found.key == bucket.address.claim(place)
    )


def _place_of(path: str) -> Place | None:
    """The version that a key, less the prefix, is of; None if it is none of ours."""
    name, _, rest = path.partition("/")
    variant, _, rest = rest.partition("/")
    folder, slash, _ = rest.partition("/")
    if slash:
        version = folder.removesuffix(STATEMENTS_SUFFIX)
    elif folder.endswith(_CLAIM_SUFFIX):
        version = folder.removesuffix(_CLAIM_SUFFIX)
    else:
        return None
    try:
        return Place(
            name=check_part("name", name),
            variant=check_part("variant", variant),
            version=check_part("version", version),
        )
    except RecipeError:
        return None
