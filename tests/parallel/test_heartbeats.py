"""What a rank says of the others when the store that they meet at is dying, too."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.parallel.heartbeats import Heartbeats

_GRACE_SECONDS = 30.0
"""What torchrun leaves the ranks to speak in, before it kills them."""


def test_a_store_that_dies_behind_the_first_call_is_named_before_the_launcher_kills(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    is_met = threading.Event()

    def serve() -> None:
        beats, _ = listener.accept()
        is_met.set()
        asks, _ = listener.accept()  # whether anybody listens: yes, and then no more
        for each in (listener, beats, asks):
            each.close()

    server = threading.Thread(target=serve)
    server.start()
    groups = SimpleNamespace(rank=1, world_size=2)
    with (
        pytest.raises(PlatformError, match="rendezvous store of 127.0.0.1 does not answer after iteration 7"),
        Heartbeats(groups, timeout_minutes=10) as heartbeats,  # type: ignore[arg-type]
    ):
        heartbeats.follow(lambda: 7)
        assert is_met.wait(60)
        begin = time.monotonic()
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36893")
    assert time.monotonic() - begin < _GRACE_SECONDS
    server.join()
