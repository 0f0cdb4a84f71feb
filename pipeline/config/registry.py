"""A registry's URL as overrides of a recipe."""

from __future__ import annotations

from pipeline.core.errors import Fault, RecipeError


def registry_overrides(url: str | None) -> tuple[str, ...]:
    """What `--registry URL` stands for; nothing for None.

    Raises:
        RecipeError: There is no such kind of registry.
    """
    if url is None:
        return ()
    scheme, found, path = url.partition("://")
    quoted = "'" + url.replace("'", "\\'") + "'"
    if not found:
        return ("registry=folder", f"registry.path={quoted}")
    if scheme == "file":
        return registry_overrides(path)
    if scheme not in ("s3", "oci"):
        message = f"{url!r} is no registry: write a folder, file:///PATH, s3://... or oci://..."
        raise RecipeError([Fault("--registry", message)])
    return (f"registry={scheme}", f"registry.url={quoted}")
