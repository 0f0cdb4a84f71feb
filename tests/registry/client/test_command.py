"""`enginesmith pull`: exit codes, JSON, and the little that it imports."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

import pipeline
from pipeline.commands.pull import pull
from pipeline.registry.stores.store import Place
from tests.registry.client.conftest import Shop

ROOT = Path(pipeline.__file__).parents[1]
_COMMAND = """
import sys, typer
from pipeline.commands.pull import pull
from pipeline.commands.outcome import failure_of
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(pull)
try:
    app(sys.argv[1:], standalone_mode=False)
except Exception as error:
    outcome = failure_of(error)
    print(outcome.message, file=sys.stderr)
    sys.exit(outcome.exit_code)
"""


def command(shop: Shop, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "ENGINESMITH_CACHE": str(shop.home / "cache"),
        "ENGINESMITH_POLICY": str(shop.policy()),
        "HOME": str(shop.home),
    }
    return subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=shop.home,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_is_one_object_for_success(shop: Shop) -> None:
    reference = shop.publish()
    done = command(
        shop, "tiny", "--to", "out", "--registry", shop.store.url, "--gpu", "rtx4090", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["exit_code"], told["digest"]) == (1, 0, reference.digest)
    assert told["dir"] == str(shop.home / "out")
    assert (told["verdict"], told["proven"]) == ("accepted", "proven")
    again = command(shop, "--verify-only", "out", "--gpu", "rtx4090", "--json")
    assert json.loads(again.stdout)["came_from"] == "verified"


def test_people_see_what_is_unknown(shop: Shop) -> None:
    shop.publish()
    done = command(shop, "tiny", "--to", "out", "--registry", shop.store.url, "--gpu", "rtx4090")
    assert "unknown   the runtime: it needs tensorrt-rtx 1.7.1.116" in done.stdout
    assert "verdict   accepted on NVIDIA-GeForce-RTX-4090" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tiny", "--gpu", "rtx4090"], 2),
        (["--to", "out", "--gpu", "rtx4090"], 2),
        (["tiny", "--to", "out", "--gpu", "potato"], 2),
        (["tiny", "--to", "out", "--gpu", "l4"], 6),
        (["tiny", "--to", "out", "--gpu", "h100"], 6),
        (["tiny", "--to", "out", "--gpu", "rtx4090", "--runtime", "vllm==0.29"], 6),
        (["tiny", "--to", "out", "--gpu", "rtx4090", "--vram", "512MiB"], 6),
        (["tiny", "--to", "out", "--gpu", "rtx4090", "--format", "trtllm"], 6),
        (["none", "--to", "out", "--gpu", "rtx4090"], 7),
        (["tiny", "--to", "out", "--gpu", "rtx4090", "--channel", "nightly"], 7),
        (["tiny", "--to", "out", "--gpu", "rtx4090", "--offline"], 7),
        (["tiny", "--to", ".", "--gpu", "rtx4090"], 8),
        (["--verify-only", ".", "--gpu", "rtx4090"], 4),
    ],
)
def test_failures_have_their_exit_code_and_the_same_object(
    shop: Shop, arguments: list[str], code: int
) -> None:
    shop.publish()
    more = [] if "--verify-only" in arguments else ["--registry", shop.store.url]
    done = command(shop, *arguments, *more, "--json")
    assert done.returncode == code, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["exit_code"]) == (1, code)
    assert told["message"]
    assert "Traceback" not in done.stderr
    assert not (shop.home / "out").exists()


def test_the_client_imports_nothing_heavy() -> None:
    script = (
        "import sys, pipeline.registry, pipeline.registry.client.pull\n"
        "import pipeline.registry.client.verify_only, pipeline.registry.stores.folder\n"
        "heavy = {'torch', 'numpy', 'transformers', 'onnx', 'boto3', 'hydra', 'omegaconf'}\n"
        "heavy |= {'rich', 'model_signing'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_importing_the_registry_does_not_import_the_client() -> None:
    script = "import sys, pipeline.registry; print('pipeline.registry.client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["init-container.yaml", "mounted-image.yaml"])
def test_the_deployment_examples_use_flags_that_exist(name: str) -> None:
    pod = yaml.safe_load((ROOT / "docs" / "deploy" / name).read_text())
    arguments = pod["spec"]["initContainers"][0]["args"]
    assert arguments[0] == "pull"
    app = typer.Typer()
    app.command()(pull)
    known = {flag for one in get_command(app).params for flag in (*one.opts, *one.secondary_opts)}
    used = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert used <= known


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(shop: Shop) -> Iterator[str]:
    """The folder registry behind a plain web server."""
    handler = functools.partial(_Quiet, directory=shop.store.url)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _curl(shop: Shop, url: str, digest: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "docs" / "deploy" / "pull-with-curl.sh"
    return subprocess.run(
        ["sh", str(script), url, digest, str(shop.to)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )


def test_plain_curl_assembles_a_valid_package(shop: Shop, web: str) -> None:
    from pipeline.registry.package import verify

    files = {"model.plan": b"1" * 5000, "a folder/ä 100%.json": b"{}", "empty": b""}
    reference = shop.publish(shop.engine(files=files))
    url = f"{web}/tiny/{reference.variant}/{reference.version}"
    done = _curl(shop, url, f"sha256:{reference.digest}")
    assert done.returncode == 0, done.stderr
    assert verify(shop.to).digest == reference.digest
    assert shop.left() == ["tiny"]


def test_plain_curl_refuses_what_was_changed(shop: Shop, web: str) -> None:
    reference = shop.publish()
    url = f"{web}/tiny/{reference.variant}/{reference.version}"
    assert _curl(shop, url, "0" * 64).returncode == 4
    plan = shop.store.location(Place.of(reference)) / "engine" / "model.plan"  # type: ignore[attr-defined]
    plan.chmod(0o644)
    plan.write_bytes(b"x" * plan.stat().st_size)
    assert _curl(shop, url, reference.digest).returncode == 4
    assert shop.left() == []
