"""Secrets of the environment: in no file that a command writes, and on no screen.

Every secret has words of its own, and all that a command wrote or printed is searched for them,
also in Base64. One case again: `pytest tests/hostile/test_secrets.py -k "override and 17"`.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.registry.trust.signing import generate_key
from tests.hostile.test_text import Here, here
from tests.hostile.world import hostile_cases
from tests.tiny_recipe import QUICK, Workplace

__all__ = ["here"]
PEM = generate_key().private_pem().decode()
SECRETS = {
    "HF_TOKEN": "hf_SecretOfTheHub",
    "AWS_ACCESS_KEY_ID": "AKIASECRETOFTHEID",
    "AWS_SECRET_ACCESS_KEY": "SecretOfTheBucket",
    "AWS_SESSION_TOKEN": "SecretOfTheSession",
    "ENGINESMITH_OCI_PASSWORD": "SecretOfTheRegistry",
    "ENGINESMITH_SIGNING_KEY_PEM": PEM,
}
_PLAIN = [*SECRETS.values(), "SecretInAUrl", "SecretOfTheProxy", "someone:SecretOfTheRegistry"]
_WORDS = [line for text in _PLAIN for line in text.splitlines() if "KEY---" not in line]
_WORDS += [base64.b64encode(word.encode()).decode().rstrip("=") for word in _WORDS]


def require_no_secret(printed: str, below: Path) -> None:
    """Search what was printed, and all files below a folder."""
    files = (path for path in below.rglob("*") if path.is_file() and not path.is_symlink())
    found = {str(path): path.read_bytes() for path in files} | {"printed": printed.encode()}
    for where, data in found.items():
        assert [word for word in _WORDS if word.encode() in data] == [], where


def search(here: Here, *words: str) -> None:
    require_no_secret(here.run(*words), here.root.parent)


@pytest.fixture
def secrets(here: Here) -> Here:
    for name, text in SECRETS.items():
        here.patched.setenv(name, text)
    here.patched.setenv("HTTP_PROXY", "http://me:SecretOfTheProxy@127.0.0.1:9")
    here.patched.setenv("ENGINESMITH_OCI_USERNAME", "someone")
    here.patched.setenv("ENGINESMITH_OCI_HOST", here.liar.host)
    return here


SPELLINGS = (
    "${{oc.env:{0}}}", "${{oc.env:{0},no}}", "${{oc.decode:${{oc.env:{0}}}}}", "a${{oc.env:{0}}}b",
    "${{oc.select:hidden}}", "${{hidden}}", "${{deep.hidden}}", "${{oc.create:${{oc.env:{0}}}}}",
    "${{env:{0}}}", "${{hydra:job.env_set.{0}}}", "${{oc.deprecated:hidden}}", "${{hidden}}/x",
)  # fmt: skip
KEYS = (
    "name", "version", "source.notice", "source.licence", "source.repo_id", "source.revision",
    "target.card", "compiler.max_batch_size", "calibration.text.file", "acceptance.targets",
    "registry.path", "hydra.run.dir", "hydra.job.name", "hydra.searchpath", "hydra.job.env_copy",
    "runner.kind", "quantizer.device", "shape.hidden_act",
)  # fmt: skip
GROUPS = ("target", "compiler", "source", "registry", "shapes@shape", "calibration")


@pytest.mark.parametrize("seed", hostile_cases(6))
def test_no_recipe_and_no_override_gets_at_a_secret(secrets: Here, seed: int) -> None:
    draw = random.Random(seed)

    def ask() -> str:
        return draw.choice(SPELLINGS).format(draw.choice(list(SECRETS)))

    lines = {"hidden": f"hidden: '{ask()}'", "deep": f"deep: {{hidden: '{ask()}'}}"}
    for key in draw.sample(KEYS, 3):
        section, _, last = key.rpartition(".")
        lines[key.split(".")[0]] = (
            f"{section}: {{{last}: '{ask()}'}}" if section else f"{last}: '{ask()}'"
        )
    group = f"override {draw.choice(GROUPS)}: '{ask()}', " if draw.random() < 0.4 else ""
    secrets.write("own/own.yaml", "\n".join([f"defaults: [phi3, {group}_self_]", *lines.values()]))
    overrides = [f"{draw.choice([*KEYS, *GROUPS])}={ask()}"] if draw.random() < 0.5 else []
    for words in ("plan own", "build own", "config own", "build phi3 --json"):
        search(secrets, *words.split(), *overrides, "--config-dir", "own")


URLS = (
    "oci://me:SecretInAUrl@{0}/x", "s3://AKIA:SecretInAUrl@bucket/x", "https://SecretInAUrl@{0}/x",
    "http://me:SecretInAUrl@{0}", "ftp://a:SecretInAUrl@x",
)  # fmt: skip


@pytest.mark.parametrize("seed", hostile_cases(6))
def test_no_server_and_no_url_brings_a_secret_to_light(secrets: Here, seed: int) -> None:
    """A server sends all that it was sent back, in every place that a message may quote."""
    draw, liar = random.Random(seed), secrets.liar
    url, other = (draw.choice(URLS).format(liar.host) for _ in range(2))
    liar.echoes, liar.status = True, draw.choice([200, 301, 400, 401, 403, 404, 409, 500])
    realm = f'Bearer realm="http://{liar.host}/t"'
    liar.texts = {"WWW-Authenticate": draw.choice(["Basic", realm])}
    for name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL"):
        secrets.patched.setenv(name, draw.choice([f"http://{liar.host}", other]))
    if draw.random() < 0.5:
        secrets.patched.delenv("HTTP_PROXY")
    registry = draw.choice([url, f"oci://{liar.host}/x", f"oci://{liar.host}/x", "s3://bucket/x"])
    for words in (
        ["list", "--registry", registry], ["list", url], ["build", "phi3", "--registry", url],
        ["pull", "tiny:1.0-00000000-000000000000", "--to", "t", "--registry", registry],
        ["copy", "tiny", "--from", registry, "--to", url], ["new", "mine", "--from", "acme/tiny"],
        ["build", "phi3", f"registry.path='{url}'", f"source.repo_id='{url}'"],
        ["new", "mine", "--from", url, "--json"],
    ):  # fmt: skip
        search(secrets, *words)


@pytest.mark.slow
def test_a_whole_line_writes_no_secret(built: Workplace, tmp_path: Path) -> None:
    place, tiny = built.copy(tmp_path / "place", packages=False), "tiny:candidate"
    env = {**SECRETS, "GITHUB_OUTPUT": str(tmp_path / "output")}
    done = [place.build(*QUICK, "--rebuild", **env)]
    for words in (
        f"show {tiny}", f"copy {tiny} --from artifacts --to other", "list --json",
        f"pull {tiny} --to pulled --gpu rtx4090 --accept-unproven --cache", "verify ./pulled",
        "generate ./pulled hi --max-tokens 2", "plan tiny --config-dir own",
        f"yank {tiny} --reason slow", "gc --delete",
    ):  # fmt: skip
        done.append(place.run(*words.split(), **env))
    printed = "".join(one.stdout + one.stderr for one in done)
    assert [one.returncode for one in done] == [0] * len(done), printed
    require_no_secret(printed, tmp_path)


def test_a_tool_gets_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
    process.run_tool(["env"], stage="dump", log_path=tmp_path / "log")
    require_no_secret("", tmp_path)
