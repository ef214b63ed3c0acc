"""Variables that name network interfaces are read as gloo and NCCL read them."""

from __future__ import annotations

from collections import namedtuple
from socket import AF_INET, AF_INET6
from unittest import mock

import psutil
import pytest

from spikingbrain_train.errors import PlatformError
from spikingbrain_train.planning.interfaces import check_interfaces, wrong_interface

_Address = namedtuple("_Address", "family")
_THERE = {
    "lo": [_Address(AF_INET)],
    "eth0": [_Address(AF_INET), _Address(AF_INET6)],
    "ib0": [_Address(AF_INET6)],
}


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", False),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "down0", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "ib1,eth0:5", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "^=eth", True),
        ("NCCL_SOCKET_IFNAME", "bond", False),
    ],
)
def test_a_name_that_leads_nowhere_is_told_with_those_that_there_are(
    name: str, value: str, found: bool
) -> None:
    there = {**_THERE, "down0": [_Address(psutil.AF_LINK)]}
    with mock.patch.object(psutil, "net_if_addrs", lambda: there):
        said = wrong_interface(True, "host-a", {name: value})
        assert wrong_interface(False, "host-a", {name: value}) == (said if name.startswith("GLOO") else "")
    expected = (
        f"{name}={value} names no network interface of host-a, which has eth0, ib0, lo; correct or unset it"
    )
    assert said == ("" if found else expected)


def test_this_machines_own_interfaces_pass_and_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_addresses = [
        name for name, each in psutil.net_if_addrs().items() if any(a.family == AF_INET for a in each)
    ]
    for name in with_addresses:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        check_interfaces(on_gpus=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere7")
    with pytest.raises(PlatformError, match="GLOO_SOCKET_IFNAME=nowhere7 names no network interface of"):
        check_interfaces(on_gpus=False)
