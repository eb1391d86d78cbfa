"""Processes and devices: alone, one a GPU on this machine, or as torchrun says.

A process that fails ends all of them. What went wrong travels to the process that started them, which says it once.
Processes that are started here meet and talk on the loopback interface alone.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fairseq.errors import MORE_MEMORY, FairseqError, out_of_memory_ends
from fairseq.models.transformer import Transformer
from fairseq.registry import import_user_dir
from fairseq.training.checkpoint_manager import how_to_continue
from fairseq.training.heartbeat import LOST_STATUS, Heartbeat, LostProcess, end_process
from fairseq.training.sharding import shard
from fairseq.training.signals import LONGEST_WAIT, SAME_SIGINT, STOP_SIGNALS, STOP_STATUSES, exit_status
from fairseq.utils.devices import choose_device, choose_dtype
from fairseq.utils.log_lines import log_to
from fairseq.utils.processes import JOB_SIGNALS, end_with_parent

logger = logging.getLogger("fairseq.train")

# What gloo says when a process has gone; NCCL does not return, its process is ended with the others
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
# A forward pass, which may run out of memory, waits for no other process; buffers are constants. (The name: torch 2.13)
_DDP_FLAGS = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_FLAGS else "broadcast_buffers": False
}
AFTERWARDS = "legacy_ddp"  # --ddp-backend that sums gradients when the backward passes are done
NAME_SECONDS = 60  # where machines come up together, the first one's name may not be known at once
_ENVIRONMENT = "env://"  # torchrun, or whoever else has set RANK, says where the processes meet
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat | None = None  # of several processes, unless turned off

    @property
    def is_master(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def from_master(self, value: T) -> T:
        """The first process's value of a small picklable object, in all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def reading(self, batches: Iterable[T], updates: Callable[[], int] | None = None) -> Iterable[T]:
        """``batches``, which are not waited for longer than ``--heartbeat-timeout``. updates: how many are done."""
        return batches if self.heartbeat is None else self.heartbeat.reading(batches, updates)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)  # else NCCL guesses

    def average_gradients(self, model: Transformer, backend: str, bucket_cap_mb: int) -> torch.nn.Module:
        """model on this device, wrapped (or sharded) so that its backward pass averages gradients over all processes.

        backend: ``--ddp-backend``; with `AFTERWARDS` and its other name the model stays as it is, with the first
        process's parameters. Raises FairseqError when the processes' models differ.
        """
        if self.size == 1:
            return model.to(self.device)
        self._require_same_size(model)
        if backend in (AFTERWARDS, "no_c10d"):
            for parameter in model.to(self.device).parameters():
                dist.broadcast(parameter.detach(), src=0)
            return model
        _import_compiler()
        if backend == "fully_sharded":
            return shard(model, self.device)
        model.to(self.device)
        ids = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=ids,
            bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=True,
            **_NO_BUFFERS,
        )

    def _require_same_size(self, model: Transformer) -> None:
        """Raise FairseqError where processes have different models: they would wait for each other for ever."""
        count = sum(parameter.numel() for parameter in model.parameters())
        largest = torch.tensor([count, -count], device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if largest.sum() != 0:
            raise FairseqError(
                f"process {self.rank} of {self.size} has a model of {count:,} parameters, another has one of another "
                "size; start all with the same flags and data"
            )


def _import_compiler() -> None:
    """torch's wrappers do it anyhow; without a search for garbage among what stays it takes two thirds of the time."""
    gc.disable()
    try:
        import torch._dynamo  # noqa: F401
    finally:
        gc.enable()


def launch(main: Callable[[Namespace, World], None], args: Namespace) -> None:
    """Run ``main(args, world)`` in as many processes as asked for, and return when all have ended.

    Under torchrun this process is one of them. Otherwise ``--distributed-world-size`` processes are started here (by
    default one a visible GPU). Raises FairseqError when there are too few GPUs, or none for ``--fp16``, and when a
    process fails.
    """
    choose_dtype(choose_device(args.cpu), args.fp16, args.bf16)  # an error before processes start
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's, which stays until its processes have ended
            end_with_parent(signal.SIGTERM)
        try:
            _run(main, args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _ENVIRONMENT, local_rank)
        finally:
            if dist.is_initialized() and dist.get_backend() == "gloo":  # its threads would abort this process
                dist.destroy_process_group()
        return
    gpus = 0 if args.cpu else torch.cuda.device_count()
    size = args.distributed_world_size or max(gpus, 1)
    if gpus and size > gpus:
        raise FairseqError(f"--distributed-world-size {size}: {gpus} GPUs are visible; ask for 1 to {gpus}, or --cpu")
    if size == 1:
        main(args, World(0, 1, choose_device(args.cpu)))
    else:
        _start_processes(main, args, size)


def _start_processes(main: Callable[[Namespace, World], None], args: Namespace, size: int) -> None:
    """Run ``main`` in ``size`` new processes, which meet in a store that this one keeps. Raises FairseqError when one
    fails, when all have been ended.

    A signal to stop goes to all of them; SystemExit with its status follows when they have ended. A second SIGINT kills
    them.
    """
    store = _listen(args.distributed_port)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it says which processes it ends
    _start_tracker()
    errors = mp.get_context("spawn").SimpleQueue()
    processes = mp.start_processes(
        _worker, (main, args, size, f"127.0.0.1:{store.port}", errors), nprocs=size, join=False, start_method="spawn"
    )
    received: list[int] = []
    interrupted = math.inf  # when, first

    def forward(signum: int, _: FrameType | None) -> None:
        nonlocal interrupted
        now = time.monotonic()
        if signum == signal.SIGINT and now > interrupted + SAME_SIGINT:
            for process in processes.processes:
                process.kill()
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            interrupted = min(interrupted, now)
        received.append(signum)
        for process in processes.processes:
            process.terminate()  # a terminal sends SIGINT to all of them itself, and two would end them at once

    previous = {s: signal.signal(s, forward) for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    ended: list[Any] = []
    try:
        _wait_for(processes.processes, ended)
        while not processes.join():
            pass
    except mp.ProcessExitedException:
        stops = [process.exitcode for process in processes.processes if process.exitcode in STOP_STATUSES]
        if not errors.empty():
            lost = any(process.exitcode == LOST_STATUS for process in processes.processes)
            raise (LostProcess if lost else FairseqError)(errors.get()) from None
        if received or stops:
            raise SystemExit(exit_status(received[0]) if received else stops[0]) from None
        for rank, process in enumerate(processes.processes):
            if process.exitcode == exit_status(signal.SIGINT):
                raise KeyboardInterrupt from None
            if process.exitcode == 0 or process in ended:
                continue
            if process.exitcode > 0:
                raise FairseqError(f"process {rank} of {size} ended with status {process.exitcode}") from None
            name = signal.Signals(-process.exitcode).name
            raise FairseqError(f"process {rank} of {size} was ended by signal {name}") from None
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for process in processes.processes:
            process.kill()


def _start_tracker() -> None:
    """Start Python's own process that cleans up after spawned ones, deaf to the signals that go to all of a job's."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in JOB_SIGNALS}  # which is inherited
    try:
        resource_tracker.ensure_running()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait_for(processes: list[Any], ended: list[Any]) -> None:
    """Return when all processes have ended. When one fails, kill the others, which may wait for it for ever.

    ended: filled with those that were killed.
    """
    running = list(processes)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        done = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in done]
        if not ended and any(process.exitcode not in (0, *STOP_STATUSES) for process in done):
            ended += running
            for process in running:
                process.kill()


def _listen(port: int) -> dist.TCPStore:
    """The store through which processes of this machine meet, on loopback: torch alone would listen on all interfaces.

    port: 0 is any free one. Raises FairseqError when it is in use.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise FairseqError(
            f"--distributed-port {port}: {error.strerror}; take another port, or none for any that is free"
        ) from error
    listener.listen(socket.SOMAXCONN)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=torch.__version__ >= "2.8",  # before, that store took no open socket
    )


def _worker(
    rank: int, main: Callable[[Namespace, World], None], args: Namespace, size: int, address: str, errors: Any
) -> None:
    log_to(sys.stdout)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    end_with_parent(signal.SIGTERM)
    mp.set_start_method(None, force=True)  # data workers start as usual, not by spawning
    if args.cpu or not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    status = 1

    def end(line: str) -> None:
        if line:
            errors.put(line)
        os._exit(LOST_STATUS)

    try:
        _run(main, args, rank, size, address, rank, end)
        return
    except LostProcess:
        pass  # the process that started all knows why the other ended
    except FairseqError as error:
        errors.put(str(error))
        status = error.exit_status
    except KeyboardInterrupt:
        status = exit_status(signal.SIGINT)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Exception as error:
        traceback.print_exc()
        errors.put(f"process {rank} of {size} failed: {type(error).__name__}: {error}"[:1000])
    sys.stdout.flush()
    os._exit(status)  # without the usual clean-up, which may wait for the others or abort for the lack of them


def _run(
    main: Callable[[Namespace, World], None],
    args: Namespace,
    rank: int,
    size: int,
    address: str,
    local_rank: int,
    end: Callable[[str], None] = end_process,
) -> None:
    """Meet the others at ``address`` and run ``main``. end: ends this process when another is lost, see Heartbeat."""
    import_user_dir(args.user_dir)
    device = choose_device(args.cpu, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = address
    if address == _ENVIRONMENT:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    heartbeat = None
    try:
        if address == _ENVIRONMENT and "MASTER_ADDR" in os.environ:
            _wait_for_name(os.environ["MASTER_ADDR"])
        store = _connect(address)
        if args.heartbeat_timeout > 0 and size > 1:
            continues = how_to_continue(args)
            heartbeat = Heartbeat(_connect(address), where, rank, size, args.heartbeat_timeout, end, continues)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FairseqError(f"process {rank} of {size} cannot meet the others at {where}: {reason}") from error
    if heartbeat is not None:
        heartbeat.start()
    try:
        with out_of_memory_ends(f"process {rank} of {size}", MORE_MEMORY):
            main(args, World(rank, size, device, heartbeat))
    except RuntimeError as error:
        if any(reason in str(error) for reason in _LOST):
            who = heartbeat.who_is_gone() if heartbeat is not None else ""
            raise LostProcess(who or f"process {rank} of {size} has lost the others, one of which failed") from error
        raise
    except SystemExit:  # all processes stop for a signal
        _leave(heartbeat)
        raise
    _leave(heartbeat)


def _wait_for_name(host: str) -> None:
    """Return when ``host`` has an address; torch would ask for it for many minutes, with a warning each time. Raises
    OSError when it has none after NAME_SECONDS.
    """
    end, warned = time.monotonic() + NAME_SECONDS, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise OSError(error.strerror) from error
            if not warned:
                logger.warning(f"MASTER_ADDR {host}: {error.strerror}; asking again for {NAME_SECONDS} seconds")
                warned = True
        time.sleep(1)


def _connect(address: str) -> dist.Store:
    """A connection of its own to the store where the processes meet."""
    if address == _ENVIRONMENT:
        store = next(iter(dist.rendezvous(address)))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes before
        return dist.PrefixStore(f"attempt_{attempt}", store)
    host, port = address.split(":")
    return dist.TCPStore(host, int(port), is_master=False)


def _leave(heartbeat: Heartbeat | None) -> None:
    if heartbeat is not None:
        heartbeat.stop()
    dist.destroy_process_group()
