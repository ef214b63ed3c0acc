"""Weights & Biases that cannot be reached is no reason not to train: what it would get lies in a file."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spikingbrain_train.config.run import LoggingConfig, WandbMode
from spikingbrain_train.runtime.git_state import git_state
from spikingbrain_train.training.alert import Alert, Level
from spikingbrain_train.training.callbacks import weights_and_biases
from spikingbrain_train.training.callbacks.weights_and_biases import WANDB_RUN_ID_FILE
from spikingbrain_train.training.report import Report
from tests.training.test_metrics import writers

ONLINE = LoggingConfig(wandb=WandbMode.online, tensorboard=False)


class Refusing(BaseHTTPRequestHandler):
    """A server that is there, and out of order."""

    def do_POST(self) -> None:
        self.send_error(503)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


class Taking(BaseHTTPRequestHandler):
    """As much of W&B as a run needs to begin; it takes whatever comes."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        name = ""
        if self.path.endswith("/graphql"):
            name = (json.loads(body)["variables"] or {}).get("name", "")
        project = {"id": "p", "name": "spikes", "entity": {"id": "e", "name": "lab"}}
        run = {"id": "1", "name": name, "displayName": "r", "config": "{}", "project": project}
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql") and b"upsertBucket" in body:
            answer = {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
        elif self.path.endswith("/graphql"):
            answer = {"data": {"viewer": {"id": "x", "entity": "lab", "teams": {"edges": []}}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """W&B reads its environment once in a process, in which other tests may have used it."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which connections are refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def out_of_order() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_goes_on_where_wandb_falls_away_and_says_at_its_end_how_to_upload_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server is one's own, at an address that the environment gives; W&B's is out of reach here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(weights_and_biases, "_FINISH_SECONDS", 1.0)
    try:
        with writers(ONLINE, tmp_path) as callbacks:
            server.shutdown()
            server.server_close()
            began = time.monotonic()
            for step in range(1, 21):
                callbacks.log(Report(step, {"train/loss": 2.5}))
            assert time.monotonic() - began < 1.0
    finally:
        server.shutdown()
        thread.join()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    (folder,) = tmp_path.glob("wandb/run-*")
    assert warning.endswith(f"upload the rest later by: wandb sync {folder}")
    assert len(stored(folder)["history"]) == 20


def stored(folder: Path) -> dict[str, list[Any]]:
    """What W&B's own file of a run holds, by kind of record, once its process has written all of it.

    It is a log in LevelDB's format.
    """
    until = time.monotonic() + 30
    (file,) = folder.glob("run-*.wandb")
    while "exit" not in (found := _by_kind(file)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _by_kind(file: Path) -> dict[str, list[Any]]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[Any]] = {}
    for data in _records(file.read_bytes()):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def _records(file: bytes) -> Iterator[bytes]:
    """Of blocks of 32 kB. Before each piece stand its checksum, its length and which piece it is."""
    block, header, whole, last = 32768, 7, 1, 4
    at, pieces = header, b""  # the file begins with a header of W&B's, as long as that of a piece
    while at + header <= len(file):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        pieces += file[at + header : at + header + length]
        at += header + length
        if kind in (whole, last):
            yield pieces
            pieces = b""


@pytest.mark.parametrize("where", ["nobody", "out_of_order"])
def test_a_run_goes_on_offline_and_says_how_to_upload_it(
    where: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", request.getfixturevalue(where))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(weights_and_biases, "_INIT_SECONDS", 2.0)
    began = time.monotonic()
    with writers(ONLINE, tmp_path) as callbacks:
        opened = time.monotonic() - began
        callbacks.log(Report(1, {"train/loss": 2.5}))
        callbacks.alert(Alert("slow rank", "rank 2 is slow", Level.warning))
    assert opened < 15
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "cannot be reached" in warning
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run-*'}" in warning

    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = stored(folder)
    run = records["run"][0]
    assert run.run_id == (tmp_path / WANDB_RUN_ID_FILE).read_text().strip()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["run"]["stage"] == "cpt" and config["stage"]["train_iters"] == 100
    assert [stage["checkpoint"] for stage in config["lineage"]] == ["earlier/checkpoints"]
    code = git_state()
    assert config["git"] == (None if code is None else vars(code))
    (point,) = [
        {".".join([item.key, *item.nested_key]).strip("."): item.value_json for item in each.item}
        for each in records["history"]
    ]
    assert json.loads(point["train/loss"]) == 2.5
    (alert,) = records["alert"]
    assert (alert.title, alert.text, alert.level) == ("slow rank", "rank 2 is slow", "WARN")
