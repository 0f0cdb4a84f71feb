"""One who holds rights in the store: to add to it, or to rewrite and delete there, but not to sign.

What he adds changes nothing: every command does what it does in the honest registry. What he
rewrites or deletes is as if it had never been there, or the command refuses: so each case is
compared with a registry that has what he left intact, and nothing of his.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.published import Package
from pipeline.registry.manifest import manifest_bytes
from pipeline.registry.reference import reference_of
from pipeline.registry.store import ENVELOPE, KINDS, RawStatement
from pipeline.registry.stores import open_store
from pipeline.registry.stores.oci import reading
from pipeline.registry.stores.oci.address import move_tag, parse_version_tag, statement_tag
from pipeline.registry.stores.oci.image import MANIFEST_TYPE, digest_of
from pipeline.registry.stores.oci.writing import WritableOciStore, describe
from pipeline.registry.stores.publication import WritableStore, new_identity
from pipeline.registry.stores.tree import moves_key, statements_key, version_key
from pipeline.registry.trust.signing import place_fields, sign_statement
from pipeline.registry.trust.verification import read_channels
from tests.hostile.world import COMMANDS, REFUSALS, Dump, Outcome, World, hostile_cases, make_world
from tests.registry.packages import VARIANT, place_of
from tests.registry.stores.faulty import running
from tests.registry.stores.oci.server import FakeRegistry
from tests.registry.team import CARD, RUNTIME

Attack = Callable[[World, random.Random], None]
_SLOW, _SERVICES = [pytest.mark.slow], [pytest.mark.services]
STORES = {"folder": [], "memory_s3": _SLOW, "memory_oci": _SLOW, "seaweed": _SERVICES,
          "memory_oci_without_referrers": _SLOW, "docker_registry": _SERVICES}  # fmt: skip
CASES = [
    pytest.param(kind, seed, id=f"{kind}-{seed}-{[*COMMANDS][seed % len(COMMANDS)]}", marks=marks)
    for kind, marks in STORES.items()
    for seed in hostile_cases(4 if marks else len(COMMANDS))[: 40 if marks is _SERVICES else None]
]
GARBAGE = [
    *(b"", b"rubbish", b"null", b"[]", b"{}", b"\xff\xfe", b"1" * 5000, b"x" * 70_000),
    *(b"[" * 100_000, b'{"payload":' * 50_000, b'{"payload": "' + b"A" * (5 << 20) + b'"}'),
    b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [7]}',
    b'{"payload": "\\ud800", "payloadType": "x", "signatures": [{"keyid": "\\u001b[2J"}]}',
]


def add(world: World, key: str, data: bytes) -> None:
    """Add an object to a tree, if none is there."""
    store: Any = world.store
    if store.objects.find(key) is None:
        world.raw.write(key, data)


def add_tag(store: WritableOciStore, name: str, tag: str, document: bytes) -> None:
    """Add a manifest, and a tag of it if there is none of that name."""
    repository = store.repository(name)
    for reference in (digest_of(document), tag):
        with contextlib.suppress(PipelineError):  # a registry wants what a manifest names
            if repository.manifest(reference) is None:
                repository.put_manifest(reference, document)


def add_statement(world: World, package: Package, name: str, envelope: bytes) -> None:
    """Add a statement; a referrer of an image even where there is one of this name."""
    place, store = place_of(package), world.store
    if not isinstance(store, WritableOciStore):
        add(world, f"{statements_key(place)}{name}/{ENVELOPE}", envelope)
        return
    document = store.repository(place.name).put_artifact(
        reading.STATEMENT_TYPE,
        {ENVELOPE: envelope},
        subject=describe(store.image(place).document, MANIFEST_TYPE),
        annotations={reading.NAME: name},
    )
    add_tag(store, place.name, statement_tag(place, name), document)


def add_move(world: World, digest: str, data: bytes, variant: str = VARIANT) -> None:
    if not isinstance(world.store, WritableOciStore):
        add(world, f"{moves_key('tiny', variant)}{digest}.dsse.json", data)
        return
    document = world.store.repository("tiny").put_artifact(
        reading.MOVE_TYPE, {reading.CONTENT: data}
    )
    add_tag(world.store, "tiny", move_tag(variant, digest), document)


def any_package(world: World, chance: random.Random) -> Package:
    return world.packages[chance.choice(["good", "worse", "yanked", "spare", "other"])]


def any_name(chance: random.Random) -> str:
    tails = [f"{chance.getrandbits(64):016x}", "0" * 16, "f" * 16, "999999999", "9" * 64]
    return f"{chance.choice(KINDS)}-{chance.choice(tails)}"


def any_digest(chance: random.Random) -> str:
    return chance.choice([f"{chance.getrandbits(256):064x}", "0" * 64, "f" * 64, "999999999"])


def statements_of(world: World, package: Package) -> list[RawStatement]:
    return world.store.read_statements(place_of(package))


def add_garbage(world: World, chance: random.Random) -> None:
    data = chance.choice(GARBAGE)
    if chance.random() < 0.4:
        add_move(world, any_digest(chance), data)
    else:
        add_statement(world, any_package(world, chance), any_name(chance), data)


def add_signed(world: World, chance: random.Random) -> None:
    """Add what a stranger signed, or a trusted key that may not, or for another registry."""
    team, package = world.team, any_package(world, chance)
    kind: Any = chance.choice([*KINDS, "move"])
    keys = {"test": team.builder, "yank": team.tester, "move": team.tester}
    key = chance.choice([world.stranger, keys.get(kind, team.releaser)])
    registry: object = world.store.identity()
    moves = [one.newest.id for one in read_channels(world.store, team.policy, "tiny", VARIANT)]
    if chance.random() < 0.6:
        kind, key, registry = chance.choice(["yank", "move"]), team.releaser, "f" * 32
        package = chance.choice([package, world.packages["yanked"]])
    fields = {
        "registry": registry,
        **place_fields(reference_of(package)),
        **{"actor": "eve", "reason": "spite", "yanked": chance.random() < 0.5},
        **{"card": CARD, "runtime": dict(zip(("name", "version"), RUNTIME, strict=True))},
        "verdict": chance.choice(["accepted", "regression"]),
        "channel": chance.choice(["stable", "candidate"]),
        "predecessor": chance.choice([None, "0" * 64, *moves]),
    }
    after = chance.choice(["", "2199-01-01T00:00:00.000000Z"])
    raw = sign_statement(kind, package.digest, fields, key, after=after)
    if kind == "move":
        add_move(world, hashlib.sha256(raw.envelope).hexdigest(), raw.envelope)
    else:
        add_statement(world, package, raw.name, raw.envelope)


def mangled(envelope: bytes, chance: random.Random) -> bytes:
    """An envelope that is nearly the signed one, or the same in other bytes."""
    junk = [{"keyid": f"{number:064x}", "sig": "00"} for number in range(9)]
    position = chance.randrange(len(envelope))
    flipped = bytes([envelope[position] ^ 1 << chance.randrange(8)])
    return chance.choice(
        [
            *[envelope] * 6,
            envelope + b"\n",
            envelope[:position],
            envelope[:position] + flipped + envelope[position + 1 :],
            b'{"payload": "e30=",' + envelope[1:],
            envelope[:-1] + b',"payload": "e30="}',
            envelope.replace(
                b'"signatures":[', b'"signatures":' + json.dumps(junk)[:-1].encode() + b","
            ),
        ]
    )


def add_replay(world: World, chance: random.Random) -> None:
    """Add what was signed, in another place, under another name, or nearly."""
    package, target = any_package(world, chance), any_package(world, chance)
    moves = [data for data in world.store.read_moves("tiny", VARIANT) if len(data) > 1000]
    raw = chance.choice([one for one in statements_of(world, package) if len(one.envelope) > 1000])
    data = mangled(chance.choice([*[raw.envelope] * 4, chance.choice(moves)]), chance)
    if chance.random() < 0.3:
        digest = chance.choice([any_digest(chance), hashlib.sha256(data).hexdigest()])
        add_move(world, digest, data, chance.choice([VARIANT, "aaa"]))
    else:
        own = f"{raw.kind}-{hashlib.sha256(data).hexdigest()[:16]}"
        add_statement(world, target, chance.choice([raw.name, own, any_name(chance)]), data)


def add_version(world: World, chance: random.Random) -> None:
    """Add versions that are none: rubbish, a good manifest elsewhere, a stranger's package."""
    package = any_package(world, chance)
    place = place_of(package)
    tail = place.version.rpartition("-")[2]
    version = chance.choice([place.version, f"0.1-aaaaaaaa-{tail}", f"9.9-ffffffff-{'f' * 12}"])
    variant = chance.choice([place.variant, "aaa", "zzz"])
    if chance.random() < 0.3:
        evil = world.team.seal(b"evil")
        team = type(world.team)(dir=world.team.dir, store=world.store)
        world.store.put_package(evil, team.statements(evil), lambda _: None)
        team.test(evil, "accepted")
        with contextlib.suppress(PipelineError):
            team.releasing(policy=team.policy).promote(str(reference_of(evil)), "stable")
    elif isinstance(world.store, WritableOciStore):
        document = world.store.image(place).document
        add_tag(world.store, place.name, f"{variant}_{version}", document)
    else:
        data = chance.choice([manifest_bytes(package.manifest), *GARBAGE])
        add(world, f"{place.name}/{variant}/{version}/manifest.json", data)


def add_beside(world: World, chance: random.Random) -> None:
    """Add files to packages and statements, and names that are none of ours."""
    place = place_of(package := any_package(world, chance))
    if isinstance(world.store, WritableOciStore):
        document = world.store.image(place_of(any_package(world, chance))).document
        subject = digest_of(world.store.image(place).document).replace(":", "-")
        for tag in (subject, "CON", f"{place.variant}_move-", "yank-0000000000000000_0", "latest"):
            add_tag(world.store, place.name, tag, document)
        return
    statement = chance.choice(statements_of(world, package)).name
    data = chance.choice(GARBAGE)
    for number in range(20):
        add(world, f"{statements_key(place)}{statement}/a{number}.json", data[:1000])
    for key in ("engine/extra.so", "extra", "engine/.git/config"):
        add(world, f"{version_key(place)}/{key}", data)
    for key in (
        "CON/a/b",
        "tiny/a./1",
        f"{place}\x1b[2J",
        f"{version_key(place)}.lease",
        "tiny/x",
        f"{place.name}/{VARIANT}/channels/stable.x.json",
        "a:b/c/d",
        "tiny/\u202e/1/x",
    ):
        add(world, key, data)  # fmt: skip


def add_odd_files(world: World, chance: random.Random) -> None:
    """Add folders, FIFOs and links in the place of files and folders, in a folder."""
    if not world.store.local:
        return
    root, place = Path(world.store.url), place_of(any_package(world, chance))
    for key in (
        f"{moves_key('tiny', VARIANT)}{any_digest(chance)}.dsse.json",
        f"{statements_key(place)}{any_name(chance)}",
        f"{statements_key(place)}{any_name(chance)}/{ENVELOPE}",
        f"tiny/{VARIANT}/0.1-aaaaaaaa-{'a' * 12}/manifest.json",
        f"tiny/{VARIANT}/0.2-aaaaaaaa-{'a' * 12}",
        f"{version_key(place)}/engine/odd",
        f"{version_key(place)}.lease",
        "zzz",
    ):
        path = root / key
        if os.path.lexists(path) or (not path.parent.exists() and chance.random() < 0.3):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        make = chance.choice(["folder", "fifo", "link", "link out", "loop"])
        if make == "folder":
            path.mkdir()
        elif make == "fifo":
            os.mkfifo(path)
        else:
            targets = {"link": root / version_key(place), "loop": path}
            path.symlink_to(targets.get(make, world.home / "private"))


def add_crowd(world: World, chance: random.Random) -> None:
    """Add more statements of one kind than are read; what was there before is still found."""
    package, kind = any_package(world, chance), chance.choice(KINDS)
    if not isinstance(world.store, WritableOciStore):  # which dates nothing: see docs/trust.md
        data = chance.choice(GARBAGE[:8])
        for number in range(1001):
            world.raw.write(
                f"{statements_key(place_of(package))}{kind}-{number:016x}/{ENVELOPE}", data
            )


ADDING: list[Attack] = [
    *[add_garbage, add_signed, add_replay, add_version, add_beside, add_odd_files] * 4,
    add_crowd,
]


def overwrite(world: World, chance: random.Random) -> None:
    """Put rubbish, or another object's bytes, in the place of an object."""
    dump = world.raw.dump()
    key, other = (chance.choice([one for one in dump if "@" not in one]) for _ in range(2))
    if chance.random() < 0.5:  # of the same kind
        same = [one for one in dump if one.rpartition("/")[2] == key.rpartition("/")[2]]
        other = chance.choice(same)
    data = chance.choice([dump[other], dump[other], dump[key][:-1], *GARBAGE[:6]])
    if isinstance(world.store, WritableOciStore):
        data = dump[other]
    with contextlib.suppress(PipelineError):  # a registry wants what a manifest names
        world.raw.write(key, data)


def flip(world: World, chance: random.Random) -> None:
    if isinstance(world.store, WritableOciStore):
        overwrite(world, chance)
        return
    key, data = chance.choice(list(world.raw.dump().items()))
    position = chance.randrange(len(data) or 1)
    changed = bytes([(data[position : position + 1] or b"\0")[0] ^ 1 << chance.randrange(8)])
    world.raw.write(key, data[:position] + changed + data[position + 1 :])


def swap(world: World, chance: random.Random) -> None:
    """Exchange what lies under two names, such as two packages' manifests or reports."""
    dump = world.raw.dump()
    key = chance.choice([one for one in dump if "@" not in one])
    same = [one for one in dump if one.rpartition("/")[2][:9] == key.rpartition("/")[2][:9]]
    other = chance.choice([one for one in same if "@" not in one])
    with contextlib.suppress(PipelineError):
        world.raw.write(key, dump[other])
        world.raw.write(other, dump[key])


def delete(world: World, chance: random.Random) -> None:
    """Remove some objects: one, a tenth, or all of a kind."""
    keys = [one for one in world.raw.dump() if "@" not in one]
    word = chance.choice(
        ["yank-", "test-", "signature-", "move-", "channels/", "registry", "engine"]
    )
    some = [key for key in keys if word in key]
    for key in chance.choice([[chance.choice(keys)], chance.sample(keys, len(keys) // 10), some]):
        world.raw.delete(key)


def change_identity(world: World, chance: random.Random) -> None:
    if isinstance(world.store, WritableOciStore):
        document = world.store.repository("registry").put_artifact(
            reading.IDENTITY_TYPE, {reading.CONTENT: new_identity()}
        )
        world.raw.write("registry:identity", document)
    else:
        world.raw.write("registry.json", chance.choice([new_identity(), *GARBAGE]))


REWRITING: list[Attack] = [
    *[overwrite, flip, swap, delete] * 4,
    *[add_signed, add_replay, add_version, change_identity],
]


HONEST = {
    "pull": [0, 6, 5, 0],
    "verify": [0, 5, 6],
    "folder": [0, 5, 0, 0],
    "generate": [0, 5, 0],
    "promote": [0, 3, 5, 0, 0],
    "yank": [0, 5, 0, 0],
    "copy": [0, 5],
    "rollback": [5, 7, 0],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_honest_registry_gives_what_its_history_says(
    folder_store: WritableStore, tmp_path: Path, command: str
) -> None:
    done = make_world(folder_store, tmp_path / "home").perform(command)
    assert [one.code for one in done] == HONEST.get(command, [0] * len(done))


@pytest.fixture
def attacked(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> World:
    world = make_world(request.getfixturevalue(f"{kind}_store"), tmp_path / "home")
    (world.home / "private").mkdir()
    (world.home / "private" / "manifest.json").write_text("mine")
    return world


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_what_is_added_changes_nothing(
    attacked: World, kind: str, seed: int, tmp_path: Path
) -> None:
    chance, command = random.Random(f"add {kind} {seed}"), [*COMMANDS][seed % len(COMMANDS)]
    for attack in chance.choices(ADDING, k=chance.randint(1, 5)):
        attack(attacked, chance)
    expected = make_world(open_store(str(tmp_path / "honest")), tmp_path / "other").perform(command)
    assert attacked.perform(command) == expected
    assert [one.read_text() for one in (attacked.home / "private").iterdir()] == ["mine"]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_what_is_rewritten_or_deleted_counts_as_gone(
    attacked: World, kind: str, seed: int, tmp_path: Path
) -> None:
    chance, command = random.Random(f"rewrite {kind} {seed}"), [*COMMANDS][seed % len(COMMANDS)]
    before = attacked.raw.dump()
    for attack in chance.choices(REWRITING, k=chance.randint(1, 4)):
        with contextlib.suppress(PipelineError, IndexError):  # what it needs is damaged already
            attack(attacked, chance)
    with intact_world(attacked, kind, before, tmp_path) as left:
        expected = left.perform(command)
    for step, (done, honest) in enumerate(zip(attacked.perform(command), expected, strict=True)):
        if done.code:
            assert done.code in REFUSALS
        if done.code != honest.code:
            assert done.code, f"{done} where an honest store gives {honest}"
            break
        if usable(done) != usable(honest):  # a list has copies of what was overwritten
            assert done.command.split()[0] in {"list", "gc"}
            assert not attacked.store.local
            whole = make_world(
                open_store(str(tmp_path / f"honest-{step}")), tmp_path / f"home-{step}"
            )
            facts = [set(facts_of(one)) for one in (done, honest, whole.perform(command)[step])]
            # A result may be gone whose package is known from a copy.
            more = {(key, value) for _, key, value in facts[0] - facts[1] - facts[2]}
            assert more <= {("verdicts", "[]"), ("proven_cards", "[]")}


@pytest.mark.parametrize("kind", ["folder", pytest.param("memory_s3", marks=_SLOW)])
@pytest.mark.parametrize("file", ["report.html", "report.json"])
def test_an_exchanged_report_is_refused_by_verify(attacked: World, kind: str, file: str) -> None:
    """In an OCI registry the statement names it by its digest, so that it cannot be exchanged."""
    for key in attacked.raw.dump():
        if key.endswith(f"/{file}"):
            attacked.raw.write(key, b"<h1>ACCEPTED</h1>")
    place = version_key(place_of(attacked.packages["good"]))
    folder = [f"verify {attacked.store.url}/{place}"] if attacked.store.local else []
    assert {attacked.run(text).code for text in ("verify {good}", *folder)} == {4}


@pytest.mark.parametrize("kind", [pytest.param(one, marks=STORES[one]) for one in STORES])
def test_eight_simultaneous_promoters_leave_one_chain_and_each_knows_how_it_ended(
    attacked: World, kind: str
) -> None:
    def enter(name: str) -> int:
        try:
            attacked.team.enter(attacked.packages[name])
        except PipelineError as error:
            return error.exit_code
        return 0

    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(enter, ["spare", "good"] * 4))
    assert 0 in codes
    assert codes <= {0, 8}
    (stable,) = read_channels(attacked.store, attacked.team.policy, "tiny", VARIANT, "stable")
    before = [None, *(one.id for one in stable.moves)]
    assert [one.predecessor for one in stable.moves] == before[:-1]
    assert [one.code for one in attacked.perform("next")] == [0, 0, 0]


def facts_of(done: Outcome) -> Iterator[tuple[str, str, str]]:
    """What is said of each package or move, fact by fact; `state` sums up others."""
    for rows in usable(done)[0].values():
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                whose = str(row.get("digest", row.get("reference", row.get("package"))))
                facts = ((key, value) for key, value in row.items() if key != "state")
                yield from ((whose, key, json.dumps(value)) for key, value in facts)


@contextlib.contextmanager
def intact_world(world: World, kind: str, before: Dump, folder: Path) -> Iterator[World]:
    """A registry with what the attacker left as it was, and nothing of his."""
    now = world.raw.dump()
    moves = {data for key, data in now.items() if "_move-" in key or "/log/" in key}
    left = {key for key, data in before.items() if now.get(key) == data or data in moves}
    store: Any = world.store
    if isinstance(store, WritableOciStore):
        identity = "registry:identity"
        left |= {key for key in before if "@" in key}  # blobs stay, whatever names them
        if kind == "memory_oci":  # its list of referrers has what a tag does not name any more
            left |= {
                key
                for key, data in before.items()
                if any(f":{kind}-" in key for kind in KINDS)
                and store.repository(key.partition(":")[0]).manifest(digest_of(data))
            }
    else:
        identity = "registry.json"
    if identity in now and identity not in left:  # moves and yanks name the identity
        left = {key for key in left if not any(word in key for word in ("yank-", "move-", "/log/"))}
    with contextlib.ExitStack() as stack:
        honest: WritableStore
        if isinstance(store, WritableOciStore):
            honest = stack.enter_context(running(FakeRegistry())).store()
        else:
            honest = open_store(str(folder / "intact"))
        intact = make_world(honest, folder / "other", left.__contains__)
        for key in (now.keys() & before.keys()) - left:  # a damaged version is still listed
            if key.endswith("/manifest.json"):
                intact.raw.write(key, b"damaged")
            elif parse_version_tag(*key.partition(":")[::2]):
                intact.raw.write(key, rubbish_document(intact, key))
        yield intact


def rubbish_document(world: World, key: str) -> bytes:
    store: Any = world.store
    document: bytes = store.repository(key.partition(":")[0]).put_artifact("x/y", {"x": b"damaged"})
    return document


def usable(done: Outcome) -> Any:
    """What a command says of the versions that can be used."""
    value = dict(done.value)
    value.pop("versions", None)
    packages = value.get("packages", [])
    value["packages"] = [one for one in packages if one["state"] not in {"damaged", "untrusted"}]
    return value, done.loaded


def snapshot(folder: Path) -> dict[str, tuple[int, float, bytes]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (
            path.lstat().st_mode,
            path.lstat().st_mtime,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in paths
    }


@pytest.mark.parametrize("seed", hostile_cases(6))
def test_no_link_in_a_folder_leads_a_command_elsewhere(
    folder_store: WritableStore, tmp_path: Path, seed: int
) -> None:
    """Not one that was added where nothing was, nor one in the place of a folder."""
    chance = random.Random(f"links {seed}")
    world, root = make_world(folder_store, tmp_path / "home"), Path(folder_store.url)
    place, private = place_of(any_package(world, chance)), tmp_path / "private"
    ghost = f"tiny/{VARIANT}/0.1-aaaaaaaa-{'a' * 12}"
    for key in ("a.txt", "engine/model.plan", "work/manifest.json", "log/x"):
        (private / key).parent.mkdir(parents=True, exist_ok=True)
        (private / key).write_bytes(b"mine")
    world.raw.write(f"{ghost}.statements/x/y", b"rubbish")
    for key in chance.sample([ghost, ".staging", ".staging/old", "tiny/zzz", "zzz"], 3):
        with contextlib.suppress(FileExistsError):
            (root / key).parent.mkdir(exist_ok=True)
            (root / key).symlink_to(private)
    folders = [path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()]
    if chance.random() < 0.7:
        target = chance.choice([root / version_key(place), *folders])
        target.rename(private / "moved")
        target.symlink_to(private / chance.choice(["moved", "."]))
    for path in (*root.rglob("*"), *private.rglob("*"), private):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    before = snapshot(private)
    for command in ("gc", *chance.sample([*COMMANDS], 3)):
        assert {one.code for one in world.perform(command)} <= {*REFUSALS, 0}
    assert snapshot(private) == before


def test_rubbish_fills_no_memory(folder_store: WritableStore, tmp_path: Path) -> None:
    world = make_world(folder_store, tmp_path / "home")
    place = place_of(world.packages["good"])
    for number in range(300):
        digest = f"{number:064x}"
        keys = [f"{statements_key(place)}{kind}-{digest[-16:]}/{ENVELOPE}" for kind in KINDS]
        for key in (*keys, f"{moves_key('tiny', VARIANT)}{digest}.dsse.json"):
            world.raw.write(key, b"")
            os.truncate(Path(folder_store.url) / key, 1 << 20)
    tracemalloc.start()
    try:
        assert [one.code for one in world.perform("pull")] == [0, 6, 5, 0]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
