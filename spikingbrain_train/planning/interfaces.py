"""Network interfaces that gloo and NCCL are told to take, held against those that there are. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

from spikingbrain_train.errors import PlatformError


def check_interfaces(on_gpus: bool) -> None:
    """Refuse a variable that names no interface of this machine, in which both libraries end unexplained.

    Raises:
        PlatformError: names the variable and the interfaces that there are.
    """
    if sentence := wrong_interface(on_gpus, socket.gethostname()):
        raise PlatformError(sentence)


def wrong_interface(on_gpus: bool, host: str, environment: Mapping[str, str] | None = None) -> str:
    """What is wrong with GLOO_SOCKET_IFNAME or, where ranks compute on GPUs, NCCL_SOCKET_IFNAME.

    Args:
        on_gpus: whether NCCL is going to be used.
        host: what the sentence calls this machine.
        environment: variables; None for this process's own.

    Returns:
        A sentence; empty where nothing is wrong.
    """
    known = os.environ if environment is None else environment
    readers: dict[str, Callable[[str, list[str]], bool]] = {"GLOO_SOCKET_IFNAME": _gloo_finds}
    if on_gpus:
        readers["NCCL_SOCKET_IFNAME"] = _nccl_finds
    for name, finds in readers.items():
        if (value := known.get(name)) and not finds(value, there := _with_addresses()):
            return (
                f"{name}={value} names no network interface of {host}, which has {', '.join(there)}; correct "
                "or unset it"
            )
    return ""


def _with_addresses() -> list[str]:
    """Interfaces that have an address: neither library takes another one."""
    import psutil

    internet = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs().items()
    return sorted(name for name, addresses in found if any(each.family in internet for each in addresses))


def _gloo_finds(value: str, there: list[str]) -> bool:
    """As torch reads it: names, each of which has to be there."""
    return set(value.split(",")) <= set(there)


def _nccl_finds(value: str, there: list[str]) -> bool:
    """As NCCL reads it: beginnings of names, behind ``=`` whole ones, behind ``^`` those to leave out."""
    others = value.startswith("^")
    value = value.removeprefix("^")
    exact = value.startswith("=")
    wanted = [each.partition(":")[0] for each in value.removeprefix("=").split(",") if each]

    def is_named(name: str) -> bool:
        return name in wanted if exact else name.startswith(tuple(wanted))

    return any(is_named(name) is not others for name in there)
