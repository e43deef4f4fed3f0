"""Whether a model can be had from the hub, asked of a server on this machine that answers as the hub does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.dumps({"model_type": "llama"}).encode()
ASK = """
import sys
from launch.hub import check_hub
from train.places import locate
try:
    check_hub(locate(sys.argv[1], "student.model"), "student.model", is_tokenizer="tokenizer" in sys.argv[2:])
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error, sep=": ")
"""


class Hub(BaseHTTPRequestHandler):
    """Has org/good, does not show org/gated, and org/bare holds no config.json."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = "/".join(self.path.split("/")[1:3])
        code, why = {"org/good": (200, ""), "org/gated": (403, "GatedRepo"), "org/bare": (404, "EntryNotFound")}.get(
            name, (404, "RepoNotFound")
        )
        self.send_response(code)
        headers = {"X-Error-Code": why} if why else {"X-Repo-Commit": "c" * 40, "ETag": '"tag"', "Content-Length": str(len(CONFIG))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(CONFIG)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"asked": asked})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def ask(address: str, home: Path, name: str, *arguments: str, offline: str = "0") -> str:
    """What is told of a model; in a process of its own, as the hub's library reads these variables when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, name, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    return done.stdout.strip()


def cached(home: Path, name: str, *files: str) -> None:
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c" * 40)
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    for file in files:
        (folder / "snapshots" / ("c" * 40) / file).write_text("{}")


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_what_the_hub_gives_is_said_in_one_line(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    assert ask(address, tmp_path, "org/good") == ""
    assert next(line for line in asked if "/org/" in line) == "HEAD /org/good/resolve/main/config.json"
    [kept] = (tmp_path / "hub").rglob("snapshots/*/config.json")
    assert kept.read_bytes() == CONFIG, "its shape is read from there"
    told = {
        "org/mispelt": f"which {address} does not have, or not for you: check the spelling, or log in with `hf auth login` if it is "
        "private",
        "org/gated": f"whose licence must be accepted: do so at {address}/org/gated, and log in with `hf auth login`",
        "org/bare": "which is on the hub but has no config.json, as models for transformers do: give the id of such a model",
        "org/a..b": "which is no folder here and cannot be a hub id: check the path, or the spelling (ORGANISATION/NAME)",
    }
    for name, why in told.items():
        assert ask(address, tmp_path, name) == f"ValueError: student.model is {name!r}, {why}"


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_what_the_cache_has_is_asked_of_nobody(weights: str, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    cached(tmp_path, "org/kept", "config.json", weights)
    assert ask(hub[0], tmp_path, "org/kept") == ""
    assert ask(hub[0], tmp_path, "org/kept", offline="1") == ""
    assert not [line for line in hub[1] if "/org/" in line]


def test_a_description_without_weights_is_not_enough_offline(tmp_path: Path, nobody: str) -> None:
    cached(tmp_path, "org/planned", "config.json", "tokenizer.json")
    told = ask(nobody, tmp_path, "org/planned", offline="1")
    cache = tmp_path / "hub"
    assert told == (
        f"RuntimeError: student.model is 'org/planned', which is neither a folder here nor in the hub's cache ({cache}), and "
        "HF_HUB_OFFLINE forbids to ask the hub: correct the name, unset the variable, or give the model's folder"
    )
    assert ask(nobody, tmp_path, "org/planned", "tokenizer", offline="1") == "", "of a tokenizer it is"


def test_a_machine_without_a_network_is_told_soon_and_how_to_bring_the_model(tmp_path: Path, nobody: str) -> None:
    began = time.monotonic()
    told = ask(nobody, tmp_path, "org/far")
    assert time.monotonic() - began < 20, "the hub's own retries take half a minute and more"
    cache = tmp_path / "hub"
    known = f"RuntimeError: student.model is 'org/far', which is neither a folder here nor in the hub's cache ({cache}), and {nobody}"
    assert told.startswith(f"{known} cannot be asked (")
    assert told.endswith("): connect, bring the cache from a machine that is (`hf download org/far`), or give the model's folder")


def test_a_folder_is_asked_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.hub import check_hub
    from train.places import locate

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    place: Any = locate(str(tmp_path), "student.model")
    check_hub(place, "student.model")
