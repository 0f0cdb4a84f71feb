from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import RecipeError
from pipeline.registry.reference import ParsedReference, parse_reference, reference_of
from tests.registry.packages import sealed_package

_names = st.from_regex(r"[a-z0-9]{1,8}([.-][a-z0-9]{1,8}){0,3}", fullmatch=True)
_versions = st.from_regex(r"[0-9]{1,3}\.[0-9]{1,3}-[0-9a-f]{8}-[0-9a-f]{12}", fullmatch=True)
_channels = st.from_regex(r"[a-z]{1,8}(-[a-z0-9]{1,8}){0,2}", fullmatch=True)
_digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("smollm2", ParsedReference(name="smollm2", channel="stable")),
        ("qwen2.5:candidate", ParsedReference(name="qwen2.5", channel="candidate")),
        (
            "llama3.1/sm89-trtrtx-fp8-b64-s1024:1.0-01234567-0123456789ab",
            ParsedReference(
                name="llama3.1",
                variant="sm89-trtrtx-fp8-b64-s1024",
                version="1.0-01234567-0123456789ab",
            ),
        ),
        (f"phi3@sha256:{'a' * 64}", ParsedReference(name="phi3", digest="a" * 64)),
        (
            f"phi3/any-checkpoint-fp8@sha256:{'a' * 64}",
            ParsedReference(name="phi3", variant="any-checkpoint-fp8", digest="a" * 64),
        ),
    ],
)
def test_reference_parses(text: str, parsed: ParsedReference) -> None:
    assert parse_reference(text) == parsed


@given(
    name=_names,
    variant=st.none() | _names,
    tail=st.one_of(
        _versions.map(lambda text: ("version", text)),
        _channels.map(lambda text: ("channel", text)),
        _digests.map(lambda text: ("digest", text)),
    ),
)
def test_parsed_reference_survives_formatting(
    name: str, variant: str | None, tail: tuple[str, str]
) -> None:
    parsed = ParsedReference(name=name, variant=variant, **{tail[0]: tail[1]})
    assert parse_reference(str(parsed)) == parsed


@given(st.text() | st.text(alphabet="ab1.-/:@_ \n\0", max_size=30))
def test_any_text_is_a_reference_or_a_usage_fault(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except RecipeError:
        return
    assert parse_reference(str(parsed)) == parsed
    for part in (parsed.name, parsed.variant, parsed.version, parsed.channel):
        assert part is None or not (set(part) & set("/\\:@ \n\0") or ".." in part or part[0] == ".")


def test_a_version_follows_from_the_manifest_and_its_digest(tmp_path: Path) -> None:
    package = sealed_package(tmp_path / "p", recipe_version="2.1", build_key="c" * 64)
    reference = reference_of(package)
    assert reference.version == f"2.1-cccccccc-{package.digest[:12]}"
    assert parse_reference(str(reference)).version == reference.version
