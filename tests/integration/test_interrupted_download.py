"""A hub on loopback whose connection breaks in the middle of a file, then mends: the same command fails clearly, then succeeds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from data.prompts import TextFormat
from train import models
from train.config import ScratchModel

REPOSITORY = "org/tiny"
COMMIT = "c" * 40
SCRATCH = ScratchModel(from_scratch="llama", d_model=16, layers=1, heads=2, vocabulary=300)
LOAD = f"""
import torch
from train import models
try:
    tokenizer = models.load_tokenizer({REPOSITORY!r}, texts=None, folder=None)
    model = models.load_model({REPOSITORY!r}, tokenizer, seed=0, dtype=torch.float32)
    print("LOADED", len(tokenizer), sum(value.double().sum().item() for value in model.state_dict().values()))
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
"""


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for one repository; `breaks` is the file whose connection breaks half-way, and then for good."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.breaks, self.sent = folder, "", dict[str, int]()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{REPOSITORY}/resolve/main/").removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        file = self.server.folder / name.lstrip("/")
        if path.startswith(f"/api/models/{REPOSITORY}"):
            files = [{"rfilename": f.name} for f in sorted(self.server.folder.iterdir())]
            body = [] if "/tree/" in path else {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": files}
            self.reply(200, json.dumps(body).encode())
        elif name == path or not file.is_file():
            known = path.startswith(f"/{REPOSITORY}/")
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        else:
            body = file.read_bytes()
            self.reply(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, broken=file.name == self.server.breaks)
            if self.command == "GET":
                self.server.sent[file.name] = self.server.sent.get(file.name, 0) + 1

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, broken: bool = False) -> None:
        if broken and self.command == "GET" and self.server.sent.get(self.server.breaks):
            self.close_connection = True  # the connection stays down: the client's own retries must fail too
            return
        self.send_response(status)
        for header, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = broken


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    tokenizer = models.load_tokenizer(SCRATCH, texts=["a few words"], folder=None)
    model = models.load_model(SCRATCH, tokenizer, seed=0, dtype=torch.float32)
    form: TextFormat = models.text_format(tokenizer, "decoder_only", max_input_tokens=8, max_label_tokens=8, max_rationale_tokens=8)
    models.save_model(model, tokenizer, form, tmp_path / "repository")
    server = Hub(tmp_path / "repository")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def load_from(hub: Hub, home: Path) -> tuple[str, str]:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1], done.stderr


def test_an_interrupted_download_is_told_and_the_same_command_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = "model.safetensors"
    told, noise = load_from(hub, tmp_path / "home")
    assert told.startswith(
        f"RuntimeError student.model is '{REPOSITORY}': the download from http://127.0.0.1:{hub.server_address[1]} was interrupted"
    )
    assert "RemoteProtocolError" in told
    assert "The same command continues it, keeping the files that arrived whole; a folder works as well" in told
    assert "HF_HUB_OFFLINE=1 with a cached copy" in told
    assert noise == ""
    whole = {name: times for name, times in hub.sent.items() if name != "model.safetensors"}
    assert "config.json" in whole

    hub.breaks = ""
    loaded, noise = load_from(hub, tmp_path / "home")
    model = models.load_model(str(hub.folder), models.load_tokenizer(str(hub.folder), texts=None, folder=None), seed=1, dtype=torch.float32)
    kind, tokens, total = loaded.split()
    assert (kind, int(tokens)) == ("LOADED", model.config.vocab_size)
    assert float(total) == pytest.approx(sum(value.double().sum().item() for value in model.state_dict().values()))
    assert {name: hub.sent[name] for name in whole} == whole, "files that arrived whole must not be fetched again"
    assert noise == ""
