"""Text, files and programs from outside: shown and never obeyed, refused in one paragraph, in time.

One case again: `pytest tests/hostile/test_text.py -k "shown and 17"`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import rfc8785

from pipeline.cli import main
from pipeline.core.errors import CorruptError, ExitCode
from pipeline.model import hf
from pipeline.registry.reference import reference_of
from pipeline.registry.stores import open_store
from tests.hostile.world import hostile_cases
from tests.registry.packages import sealed_package
from tests.registry.stores.faulty import FaultyHandler, FaultyServer, running
from tests.registry.team import Team
from tests.test_bad_input import LLAMA
from tests.tiny import tiny_tokenizer
from tests.tiny_recipe import CHECKPOINT, QUICK, Workplace

LIMIT_S = 20
MOST_BYTES = 2 << 30
# What a terminal obeys: controls but tab and line break, and what turns the direction of writing.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
EVIL = (
    "\x1b[2J\x1b[31m", "\x1b]0;title\x07", "\x1b]52;c;cm0gLXJm\x07", "\x9b1;1H", "\r", "\b" * 9,
    "\u202egpj.exe", "\u2066x\u2069", "\u2028", "\x7f", "\x00", "[red]", "[/]", "{evil}", "%s%n",
    "\nFORGED: signed by ci\n", "\n::set-output name=a::b\n", "\nexit_code<<x\n0\nx\n", "\n\n",
    "<script>alert(1)</script>", "'; rm -rf ~; '", "${oc.env:HOME}", "é\u0301", "a" * 3000,
)  # fmt: skip


class Liar(FaultyServer):
    """Answers every request alike; one that echoes sends back all that it was sent."""

    def __init__(self) -> None:
        super().__init__(_LiarHandler)
        self.status, self.body, self.texts, self.echoes = 500, b"", dict[str, str](), False


class _LiarHandler(FaultyHandler):
    server: Liar

    def respond(self) -> None:
        status, texts, body = self.server.status, self.server.texts, self.server.body
        if self.server.echoes:
            sent = f"{dict(self.headers)} {self.path}"
            status = status if "Authorization" in self.headers else 401
            told = {"errors": [{"code": "X", "message": sent}], "error": sent, "token": sent}
            texts, body = {**texts, "Location": f"/{quote(sent)}"}, json.dumps(told).encode()
        head = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}"]
        head += [f"{name}: {' '.join(text.split())}" for name, text in texts.items()]
        self.wfile.write("\r\n".join([*head, "", ""]).encode("utf-8", "replace") + body)


@dataclass(frozen=True)
class Here:
    """The current folder, which is empty, and what commands print and write in it."""

    root: Path
    liar: Liar
    capsys: pytest.CaptureFixture[str]
    patched: pytest.MonkeyPatch

    def write(self, path: str, content: object) -> str:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        target.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
        return str(target)

    def run(self, *words: str) -> str:
        """A command: a code of ours, in time, no traceback, and nothing that a screen obeys."""
        output = self.root / "github"
        output.write_text("")
        self.patched.setattr(sys, "argv", ["enginesmith", *words])
        self.patched.setenv("GITHUB_OUTPUT", str(output))
        signal.alarm(LIMIT_S)
        code = main()
        signal.alarm(0)
        out, err = self.capsys.readouterr()
        logs = [log.read_text() for log in self.root.glob("artifacts/.runs/*/build.log")]
        for text in (out, err, output.read_text(), *logs):
            assert not OBEYED.search(text), (words, text)
            lines = "" if text == output.read_text() else text  # its values end at a random mark
            assert not re.search("^(FORGED|::)", lines, re.MULTILINE), (words, text)
        assert "Traceback" not in err, err
        assert code in set(ExitCode) - {ExitCode.INTERRUPTED}
        marks = re.findall(r"^\w+<<(end-\w+)$", output.read_text(), re.MULTILINE)
        assert len(marks) == 6 * len(set(marks))
        assert "--json" not in words or json.loads(out)["exit_code"] == code
        return out + err


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Here]:
    for name in ("cache", "config", "here"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"ENGINESMITH_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("ENGINESMITH_ACTOR", "ada")
    monkeypatch.chdir(tmp_path / "here")
    backoff = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    for name in ("urllib3.Retry.sleep", backoff):
        monkeypatch.setattr(name, lambda *_, **__: 0.0)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        with running(Liar()) as liar:
            most = pages * resource.getpagesize() + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
            yield Here(tmp_path / "here", liar, capsys, monkeypatch)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def publish(here: Here) -> dict[str, str]:
    """A package in stable of `artifacts`, the policy and the key; where things are."""
    team = Team(dir=here.root.parent, store=open_store("artifacts"))
    package = team.publish(verdict="accepted")
    team.enter(package)
    here.patched.setenv("ENGINESMITH_POLICY", str(team.policy_file()))
    here.patched.setenv("ENGINESMITH_SIGNING_KEY_PEM", team.releaser.private_pem().decode())
    place = reference_of(package)
    variant = f"artifacts/{place.name}/{place.variant}"
    return {"good": str(place), "variant": variant, "version": f"{variant}/{place.version}"}


@dataclass(frozen=True)
class Attack:
    """One seed's text, at one of many places; each gives the commands that meet it."""

    here: Here
    draw: random.Random

    def text(self, without: str = "") -> str:
        made = "x" + "x".join(self.draw.choices(EVIL, k=self.draw.randint(1, 3)))
        return "".join(one for one in made if one not in without)

    def file_name(self) -> str:
        return self.text(without="/\x00")[:80]

    def spoil(self, value: Any) -> Any:
        """The value with the text in the place of a leaf, or as one more key."""
        if isinstance(value, dict) and value:
            key = self.draw.choice(list(value))
            more = self.draw.random() < 0.2
            return {**value, **({self.text(): 1} if more else {key: self.spoil(value[key])})}
        if isinstance(value, list) and value:
            return [self.spoil(value[0]), *value[1:]]
        return self.text()

    def package(self, folder: Path) -> None:
        """A package with the text in its manifest, which obeys every other rule."""
        made = sealed_package(folder)
        (made.dir / "manifest.json").chmod(0o644)
        (made.dir / "manifest.json").write_bytes(rfc8785.dumps(self.spoil(made.manifest)))
        (made.dir / "engine" / self.file_name()).write_bytes(b"")

    def model(self) -> list[list[str]]:
        tensors = {"lm_head.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
        header = json.dumps(self.spoil(tensors)).encode()
        name = f"{self.file_name()}/model"
        for path, value in {
            f"{name}/config.json": self.draw.choice([LLAMA, self.spoil(LLAMA)]),
            f"{name}/hf_quant_config.json": {"quantization": self.spoil({"quant_algo": "FP8"})},
            f"{name}/model.safetensors": len(header).to_bytes(8, "little") + header + b"0000",
            f"{name}/{self.draw.choice(['x', 'model.safetensors.index.json'])}": {
                "weight_map": self.spoil({"lm_head.weight": "model.safetensors"})
            },
        }.items():
            self.here.write(path, value)
        return [["new", "mine", "--from", name], ["export-trtllm", name, "out", "--json"]]

    def registry(self) -> list[list[str]]:
        """Beside an honest package: what one leaves there who may only add."""
        names = publish(self.here)
        payload = base64.b64encode(json.dumps(self.spoil({"a": {"b": 1}})).encode()).decode()
        signature = {"keyid": self.text(), "sig": "AA=="}
        envelope = {"payload": payload, "payloadType": "t", "signatures": [signature]}
        for folder in (f"{names['version']}.statements", f"{names['variant']}/channels/log"):
            for name in (f"{self.file_name()}", f"signature-{'0' * 16}", f"{'0' * 64}.dsse.json"):
                self.here.write(f"{folder}/{name}", self.spoil(envelope))
                self.here.write(f"{folder}/{name}x/envelope.json", self.spoil(envelope))
        for folder in ("artifacts", "artifacts/tiny", names["variant"], "."):
            self.package(self.here.root / folder / self.file_name())
        self.package(self.here.root / "p")
        commands = (
            "list", "list --json", "show {good}", "channels --history", "gc", "verify {good}",
            "pull tiny --to t --gpu rtx4090", "copy {good} --from artifacts --to b",
            "verify ./p --allow-unsigned", "verify ./p --json",
        )  # fmt: skip
        reason = ["yank", names["good"], f"--reason={self.text(without=chr(0))}"]
        return [reason, *(one.format_map(names).split() for one in commands)]

    def recipe(self) -> list[list[str]]:
        text = self.text(without="\x00")
        targets = {"targets": [{"name": "n", "batch": "b"}]}
        value = self.spoil({"source": {"notice": "n"}, "acceptance": targets, "name": "n"})
        self.here.write("own/own.yaml", {"defaults": ["phi3", "_self_"], **value})
        self.here.write(
            "own/raw.yaml", f"defaults: [phi3]\nsource: {{notice: {text!r}}}\n{text}: [{text}]"
        )
        self.here.write(f"own/{self.file_name()}.yaml", "a: 1")
        key = self.draw.choice(["name", "source.notice", "target", "compiler.max_batch_size", text])
        given = [["own"], ["raw"], ["phi3", f"{key}={text}"], [text]]
        return [
            [command, *words, "--config-dir", "own"]
            for words in given
            for command in (self.draw.choice(["plan", "build"]), "config")
        ]

    def words(self) -> list[list[str]]:
        """Names on the command line, as a shell's `*` gives them; keys and policies."""
        text, name = self.text(without="\x00"), self.file_name()
        key = {"name": "n", "public_key": "k", "may_sign": ["builds"]}
        policy = self.here.write("policy.yaml", self.spoil({"schema": 1, "keys": [key]}))
        public = self.here.write(f"{name}.pub", self.text())
        found = [
            ["verify", text],
            ["show", text, "--json"],
            ["list", text],
            [text],
            ["list", f"--{text}"],
        ]
        found += [
            ["new", text, "--from", "."],
            ["new", "mine", "--from", text],
            ["sign", "a", "--key", text],
        ]
        return [*found, ["list", "--policy", policy], ["policy", public, "--out", "made.yaml"]]

    def server(self) -> list[list[str]]:
        """Whatever is asked of a registry, a bucket or a Hub, the answer is the text."""
        liar = self.here.liar
        liar.status = self.draw.choice([200, 200, 301, 307, 400, 401, 403, 404, 409, 416, 500])
        told = {"errors": [{"code": self.text(), "message": self.text()}], "error": self.text()}
        xml = f"<Error><Code>{self.text()}</Code><Message>{self.text()}</Message></Error>"
        liar.body = self.draw.choice([json.dumps(told), xml, self.text()]).encode()
        where = self.draw.choice(["http://127.0.0.1:1/", "https://elsewhere.example/", ""])
        names = ("Location", "X-Error-Message", "X-Error-Code", "ETag", "Content-Range", "Link")
        liar.texts = {name: where + self.text() for name in names}
        liar.texts["WWW-Authenticate"] = f'Bearer realm="{where}",service="{self.text()}"'
        for name in ("AWS_ENDPOINT_URL", "HF_ENDPOINT"):
            self.here.patched.setenv(name, f"http://{liar.host}")
        urls = [f"oci://{liar.host}/engines", "s3://bucket/engines"]
        pull = ["pull", "tiny:1.0-00000000-000000000000", "--to", "t"]
        words = [[*one, "--registry", url] for url in urls for one in (["list"], pull, ["gc"])]
        return [*words, ["new", "mine", "--from", "acme/tiny"]]


@pytest.mark.parametrize("seed", hostile_cases(10))
def test_text_of_others_is_shown_and_not_obeyed(here: Here, seed: int) -> None:
    attack = Attack(here, random.Random(seed))
    places = (attack.model, attack.registry, attack.recipe, attack.words, attack.server)
    for words in places[seed % len(places)]():
        here.run(*words)


def _huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(3 << 30)


KINDS: tuple[Callable[[Path], object], ...] = (
    Path.mkdir, os.mkfifo, _huge,
    lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("/dev/zero"),
)  # fmt: skip
CONTENTS = (
    b"", b"\0" * 99, b"\xff\xfe{\0}\0", b"\x80", b"{}", b"[]", b"null", b"3", b'"text"', b"[[1]]",
    b"[" * 100_000, b'{"a":' * 100_000, b'{"a":1,"a":2}', b"- " * 999, b"a: &a [*a]", b"1" * 5000,
    b"&a {schema: 1, keys: [*a]}", b"!!python/object/apply:os.system [id]", b'{"schema":1e999}',
    b'{"schema": NaN}', b'{"\\ud800": 1}', b"\xef\xbb\xbf{}", b"a\tb: %\n@", b"\0" * 7 + b"\xff",
    (1 << 30).to_bytes(8, "little"), b"-----BEGIN PUBLIC KEY-----\nA\n-----END PUBLIC KEY-----",
)  # fmt: skip
BUILD, PULL = "build local --config-dir own", "pull tiny --to t --gpu rtx4090 --cache"
PLACES: Mapping[str, tuple[str, ...]] = {
    "own/own.yaml": ("plan own --config-dir own", "build own --config-dir own"),
    "own/shapes/s.yaml": ("plan uses --config-dir own", "config uses --config-dir own"),
    "policy.yaml": ("list --policy policy.yaml", f"{PULL} --policy policy.yaml"),
    "../config/policy.yaml": ("list", "promote {good}", "build phi3"),
    "../config/local.key": ("list", "yank {good}", "build phi3"),
    "key": ("sign {good} --key key", "policy key --out made.yaml"),
    "model/config.json": ("new mine --from model", BUILD),
    "model/model.safetensors": (BUILD,),
    "model/model.safetensors.index.json": (BUILD, "export-trtllm model o"),
    "model/hf_quant_config.json": ("export-trtllm model o",),
    "model/tokenizer.json": (BUILD, "export-trtllm model o"),
    "p/manifest.json": ("verify ./p --allow-unsigned", "pull ./p --to t"),
    "p/engine/model.plan": ("verify ./p --allow-unsigned",),
    "artifacts/registry.json": ("list", "channels", PULL, "gc"),
    "{version}/manifest.json": ("list", "show {good}", PULL, "gc"),
    "{version}.statements": ("list", "show {good}", PULL, "gc"),
    "{version}.statements/0": ("list", PULL, "yank {good}"),
    "{variant}/channels/log/0": ("channels", "promote {good}", "rollback tiny", "list", PULL),
    "artifacts/tiny": ("list", "show tiny", PULL, "gc --delete"),
    "artifacts": ("list", "build phi3", PULL, "promote {good}"),
    "../cache": (PULL, "build phi3"),
    "docker/config.json": ("list --registry oci://127.0.0.1:1/x",),
    "t": (PULL, "verify ./t"),
}


@pytest.mark.parametrize("seed", hostile_cases(10))
def test_what_is_no_file_of_its_kind_ends_in_one_paragraph(here: Here, seed: int) -> None:
    draw, names, places = random.Random(seed), publish(here), list(PLACES)
    where = places[seed % len(places)] if seed >= len(places) else draw.choice(places)
    here.write("own/uses.yaml", "defaults: [phi3, shapes@shape: s, _self_]")
    local = "source: {path: model, licence: x}"
    here.write("own/local.yaml", f"defaults: [phi3, {{override source: local}}, _self_]\n{local}")
    for name in ("config.json", "tokenizer.json", "hf_quant_config.json"):
        here.write(f"model/{name}", LLAMA)
    here.write("model/model.safetensors", (2).to_bytes(8, "little") + b"{}")
    sealed_package(here.root / "p")
    here.patched.setenv("DOCKER_CONFIG", "docker")
    for name in ("POLICY", "SIGNING_KEY_PEM") if where.startswith("../config") else ():
        here.patched.delenv(f"ENGINESMITH_{name}")
    path = here.root / where.format_map(names)
    if path.name == "0":  # the first that is there
        path = min(path.parent.iterdir())
    if path.is_dir():
        path.rename(here.root / "aside")
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if draw.random() < 0.4:
        draw.choice(KINDS)(path)
    else:
        path.write_bytes(draw.choice(CONTENTS))
    for words in PLACES[where]:
        here.run(*words.format_map(names).split())


BOMBS = (
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'ROLE' * 10**8 }}", "{{ 9 ** (9 ** 9) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}ROLE{% endfor %}{% endfor %}",
    "{{ '%099999999999d'|format(1) }}", "{{ 'ROLE'|center(10**10) }}", "{{ [1] * 10**9 }}",
    "{% set n = namespace(s='R') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{m()}}", "{{ range(10**5)|list|tojson(indent=9**6) }}",
    "{{ raise_exception('\x1b[2J') }}", "{{ messages.no.no }}", "{{ 1 / 0 }}", "", "{% set x = %}",
    "x" * (2 << 20), "{{ " + "(" * 9999, "{{ lipsum(n=10**7) }}", "{{ ('a '*10**7)|wordwrap(1) }}",
)  # fmt: skip


@pytest.mark.parametrize("seed", hostile_cases(6))
def test_a_template_ends_in_time_and_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    bomb = BOMBS[seed % len(BOMBS)].replace("ROLE", draw.choice("xyz") * draw.randint(1, 9))
    tokenizer.chat_template = draw.choice(["", "{{ bos_token }}"]) + bomb
    monkeypatch.setattr(hf, "_TEMPLATE_S", 0.3)
    limits, begun = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with contextlib.suppress(CorruptError):
        ids = hf.chat_ids(tokenizer, [{"role": "user", "content": "hi"}])
        assert ids is None or len(ids) < 9
    assert time.monotonic() - begun < LIMIT_S
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_template_whose_time_ends_as_it_does_is_one_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer()
    set_timer = signal.setitimer

    def too_late(which: int, seconds: float) -> object:
        before = set_timer(which, seconds)
        if not seconds:
            signal.raise_signal(signal.SIGALRM)
        return before

    monkeypatch.setattr(signal, "setitimer", too_late)
    with pytest.raises(CorruptError, match="takes more than"):
        hf.chat_ids(tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.slow
def test_build_and_generate_end_where_a_template_does_not(built: Workplace, tmp_path: Path) -> None:
    place = built.copy(tmp_path / "place", packages=False)
    (place.root / "model").unlink()
    shutil.copytree(built.root / "model", place.root / "model")
    (place.root / "model/chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    model = (f"source.path={place.root / 'model'}", "name=bomb")
    done = place.build(*QUICK, *model)
    assert done.returncode == 0, done.stderr
    for done in (place.run("generate", "bomb:candidate", "hi"), place.build(*CHECKPOINT, *model)):
        assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
        assert "its chat template takes more than" in done.stderr
