"""Forms the process groups of a run from its ParallelConfig and the launcher's environment."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.setting import check_fields
from spikingbrain_train.errors import PlatformError
from spikingbrain_train.parallel.attempts import agree_on_attempt
from spikingbrain_train.planning.interfaces import check_interfaces
from spikingbrain_train.planning.launch import Launch, available_cores
from spikingbrain_train.planning.parallel_checks import check_world_size
from spikingbrain_train.runtime import megatron_versions, patches
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


_GLOO_SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class ProcessGroups:
    """The layout of a run as this rank sees it. Made once by :func:`initialize`."""

    accelerator: Accelerator
    device: torch.device
    """Where this rank's tensors live."""
    rank: int
    world_size: int
    tensor_model_parallel_rank: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_rank: int
    pipeline_model_parallel_size: int
    context_parallel_rank: int
    """Which slice of every sequence this rank holds."""
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    """Replicas, each of which reads sequences of its own (context-parallel ranks share theirs)."""
    expert_model_parallel_rank: int
    """Which share of every layer's routed experts this rank holds."""
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    collection: ProcessGroupCollection
    """megatron-core's groups by name (``tp``, ``pp``, ``cp``, ``dp``, ``dp_cp``, ``ep``, ``expt_dp``, ...),
    for its ``pg_collection`` arguments.
    """

    @property
    def is_main_process(self) -> bool:
        """True on rank 0: the one that prints and writes shared files."""
        return self.rank == 0

    @property
    def is_pipeline_first_stage(self) -> bool:
        """True where the embedding is."""
        return self.pipeline_model_parallel_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        """True where the loss is."""
        return self.pipeline_model_parallel_rank == self.pipeline_model_parallel_size - 1

    def sum_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` of the last pipeline stage over data- and context-parallel ranks, in place.

        Every rank gets the result.
        """
        torch.distributed.all_reduce(values, group=self.collection.dp_cp)
        if self.pipeline_model_parallel_size > 1:
            last = torch.distributed.get_global_rank(
                self.collection.pp, self.pipeline_model_parallel_size - 1
            )
            torch.distributed.broadcast(values, src=last, group=self.collection.pp)
        return values

    def describe(self) -> str:
        """One line for run_details.txt."""
        text = (
            f"{self.world_size} rank(s) = tensor {self.tensor_model_parallel_size} x pipeline "
            f"{self.pipeline_model_parallel_size}"
        )
        if self.context_parallel_size > 1:
            text += f" x context {self.context_parallel_size}"
        text += f" x data {self.data_parallel_size}"
        if self.expert_model_parallel_size > 1:
            text += f"; experts over {self.expert_model_parallel_size} ranks"
        if self.expert_tensor_parallel_size != self.tensor_model_parallel_size:
            text += f"; each expert over {self.expert_tensor_parallel_size} rank(s)"
        return f"{text}, {torch.get_num_threads()} CPU thread(s) each"


def initialize(
    parallel: ParallelConfig, accelerator: Accelerator, *, seed: int, timeout_minutes: float = 10.0
) -> ProcessGroups:
    """Join the world, form megatron-core's groups, and seed every generator.

    Order of work: refuse layouts that do not fit the world, bind the device, set CPU threads, patch
    megatron-core and torch (runtime/patches.py), form the groups, seed. Call it once, before the model is
    built; :func:`destroy` undoes all but the patches.

    Args:
        parallel: parallel degrees.
        accelerator: platform of this process, from :func:`spikingbrain_train.runtime.accelerator.detect`.
        seed: base seed. Weights initialised under tensor parallelism, and dropout, draw from streams derived
            from it per rank.
        timeout_minutes: a collective that waits longer fails.

    Raises:
        ConfigurationError: the degrees do not divide the world size, or ``data_parallel_size`` is not what
        is left.
        PlatformError: the launcher's environment is incomplete, the rendezvous host is unknown, a variable
        names a network interface that is not there, or a rank has no GPU.
    """
    megatron_versions.check_version()
    launch = Launch.from_environment()
    check_fields(parallel, "parallel.")
    check_world_size(parallel, launch.world_size)
    check_interfaces(accelerator.is_gpu)
    device = accelerator.bind(launch.local_rank)
    if not accelerator.is_gpu:
        torch.set_num_threads(threads_per_rank(launch.local_world_size))
        keep_freed_memory()
    patches.apply(accelerator)
    _join_world(launch, accelerator, timedelta(minutes=timeout_minutes))
    form_groups(parallel, timeout_minutes=timeout_minutes)
    _seed(seed)

    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroups(
        accelerator=accelerator,
        device=device,
        rank=launch.rank,
        world_size=launch.world_size,
        tensor_model_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel.context_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        expert_model_parallel_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def form_groups(parallel: ParallelConfig, *, timeout_minutes: float) -> None:
    """Form megatron-core's groups in the world that this process has joined."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )


def destroy() -> None:
    """Leave every group. Harmless if :func:`initialize` was not called or failed half-way."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        # A gloo worker that has just finished a collective frees its tensors, for which it needs Python's
        # lock while it holds its group's; destroying that group waits for the worker with Python's lock held
        # (seen with torch 2.6). Sleeping lends the lock to the workers first.
        time.sleep(_GLOO_SETTLE_SECONDS)
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _start_name.clear()


def is_main_process() -> bool:
    """True on rank 0, and in a process that has joined no world."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def threads_per_rank(local_world_size: int, environment: Mapping[str, str] | None = None) -> int:
    """CPU threads for one rank.

    OMP_NUM_THREADS where somebody chose it, else this node's cores divided over its ranks.

    torchrun itself exports OMP_NUM_THREADS=1 to every worker of a multi-worker node; that is a default and
    not a choice, so a 1 under torchrun counts as unset.
    """
    environment = os.environ if environment is None else environment
    chosen = environment.get("OMP_NUM_THREADS", "")
    torchrun_default = chosen == "1" and "TORCHELASTIC_RUN_ID" in environment and local_world_size > 1
    if chosen.isdigit() and int(chosen) > 0 and not torchrun_default:
        return int(chosen)
    return max(1, available_cores() // local_world_size)


def _seed(seed: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # Megatron's convention
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def _join_world(launch: Launch, accelerator: Accelerator, timeout: timedelta) -> None:
    backend = accelerator.collective_backend
    if launch.master_addr is None:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    os.environ["MASTER_ADDR"] = master = reachable_master(launch)
    choose_interface(master)  # for gloo, also beside NCCL: copies in memory are sent from host to host
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        torch.distributed.init_process_group(
            backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
        return
    store = torch.distributed.TCPStore(master, launch.master_port, is_master=False, timeout=timeout)
    # torchrun's store outlives a restart (torch 2.13 no longer puts a prefix before its keys).
    if not _is_one_node(launch) and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        starts = torch.distributed.PrefixStore("starts", store)
        seconds = timeout.total_seconds()
        _start_name.append(agree_on_attempt(starts, launch.rank, launch.world_size, seconds))
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.PrefixStore(f"ranks/{restart_prefix()}", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


_start_name: list[str] = []
"""What the ranks of several machines have agreed on, while they are a world."""


def restart_prefix() -> str:
    """Different after every restart by torchrun, the same on all ranks."""
    if _start_name:
        return f"start_{_start_name[-1]}"
    return f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _is_one_node(launch: Launch) -> bool:
    return launch.local_world_size == launch.world_size


def reachable_master(launch: Launch) -> str:
    """The launcher's MASTER_ADDR, or 127.0.0.1 where it is a name of this machine that does not resolve.

    Raises:
        PlatformError: another node does not know the name.
    """
    master_addr = launch.master_addr
    assert master_addr is not None, "only launchers name a host to meet at"
    try:
        socket.getaddrinfo(master_addr, None)
    except OSError:
        if _is_one_node(launch):
            return "127.0.0.1"  # the store is on this machine, whatever the machine calls itself
        raise PlatformError(
            f"MASTER_ADDR={master_addr} cannot be resolved on {socket.gethostname()}; set it to an address "
            "that every node can reach."
        ) from None
    return master_addr


def choose_interface(master: str) -> None:
    """Have gloo talk over the interface that leads to a host, unless GLOO_SOCKET_IFNAME says which."""
    if not os.environ.get("GLOO_SOCKET_IFNAME"):
        interface = _interface_towards(master)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def _interface_towards(host: str) -> str | None:
    """Name of the network interface whose address this machine uses to talk to ``host``.

    gloo otherwise binds to what the machine's own name resolves to: an error where it does not resolve, and
    on Debian 127.0.1.1, which other nodes cannot reach.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # a datagram socket only looks up the route; nothing is sent
            own_address = probe.getsockname()[0]
    except OSError:
        return None
    if not Path("/sys/class/net").is_dir():  # SIOCGIFADDR below is Linux's; gloo's own choice elsewhere
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(query.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == own_address:
                return name
    return None
