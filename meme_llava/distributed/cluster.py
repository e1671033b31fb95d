"""The nodes of a run: how they meet, and whether all of them are still there.

Machine 0 keeps a `torch.distributed.TCPStore`, which the run's processes meet at, too. Every machine writes a sign of
life into it every few seconds. A machine that vanishes without a word, as when it loses its power or its network, is
noticed by the others for lack of it; waiting for its processes would take until torch's own limit.
"""

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import psutil

from meme_llava.errors import ProcessError, Stopped, UserError
from meme_llava.machine import count_cores

BEAT_SECONDS = 2
LOST_SECONDS = 20
LINGER_SECONDS = 10
OPERATION_SECONDS = 8
DONE, FAILED, RUNS = "done", "failed", "runs"


class Cluster:
    """The machines of a run as one of them sees them. `progress` holds how far each of its own processes is.

    Args:
        node: number of this machine.
        environment: what all its processes get.
        store: where the machines meet; None on a single one.
    """

    def __init__(self, nodes: int, node: int, processes: int, environment: dict[str, str], store):
        self.nodes = nodes
        self.node = node
        self.progress: dict[int, int] = {}
        self._processes = processes
        self._environment = environment
        self._store = store
        self._state = {"state": RUNS, "code": 0, "message": ""}
        self._others: dict[int, dict] = {}
        self._last_news = dict.fromkeys(range(nodes), time.monotonic())
        self._reached_store = time.monotonic()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_end, daemon=True)

    def make_environment(self, local_rank: int) -> dict[str, str]:
        """What torch.distributed reads in a process; empty for a single process, which needs none of it."""
        if self.nodes * self._processes == 1:
            return {}
        numbers = {
            "RANK": self.node * self._processes + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.nodes * self._processes,
            "LOCAL_WORLD_SIZE": self._processes,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": self.nodes,
        }
        return {**self._environment, **{name: str(number) for name, number in numbers.items()}}

    def start(self, timeout: float) -> None:
        """Wait until all machines are there. Raises ProcessError when one is not there in time."""
        if self.nodes == 1:
            return
        self._thread.start()
        end, told = time.monotonic() + timeout, time.monotonic()
        while missing := sorted(set(range(self.nodes)) - {self.node} - set(self._others)):
            if time.monotonic() > end:
                raise ProcessError(
                    f"machine {', '.join(map(str, missing))} of {self.nodes} did not come within {timeout:g} s. Start "
                    "run.sh there, with the same NNODES, MASTER_ADDR and MASTER_PORT and its own NODE_RANK."
                )
            if time.monotonic() > told:
                left = f"{end - time.monotonic():.0f} s longer at most"
                print(f"waiting for machine {', '.join(map(str, missing))} of {self.nodes}, {left}", flush=True)
                told = time.monotonic() + 60
            time.sleep(0.2)
        counts = {node: beat["processes"] for node, beat in self._others.items()}
        if different := {node: count for node, count in counts.items() if count != self._processes}:
            raise ProcessError(
                f"this machine starts {self._processes} process(es), machine {min(different)} "
                f"{different[min(different)]}; all must start as many. Give GPUS the same number on each."
            )
        self._last_news = dict.fromkeys(range(self.nodes), time.monotonic())

    def find_failure(self) -> UserError | None:
        """The error that another machine reports, or that it is not there any more."""
        for node, beat in self._others.items():
            if beat["state"] == FAILED and beat["code"] != Stopped.exit_code:
                error = ProcessError(f"machine {node} stopped: {beat['message'] or 'see its own output'}")
                error.exit_code = beat["code"]
                return error
        silence = {node: time.monotonic() - self._last_news[node] for node in self._others if self._is_running(node)}
        lost = [node for node, seconds in silence.items() if seconds > LOST_SECONDS]
        unreachable = time.monotonic() - self._reached_store > LOST_SECONDS
        if self.nodes == 1 or not (lost or unreachable):
            return None
        names = "0" if unreachable and self.node != 0 else ", ".join(map(str, lost))
        return ProcessError(
            f"machine {names} has given no sign of life for {LOST_SECONDS} s; the processes here were ended. The "
            "newest checkpoint is kept; start the same command again on all machines, or on those that are left."
        )

    def stopped_elsewhere(self) -> bool:
        """Whether a signal stopped the run on another machine."""
        return any(beat["state"] == FAILED and beat["code"] == Stopped.exit_code for beat in self._others.values())

    def read_all_progress(self) -> dict[int, int]:
        """How far every process of the run is, as far as known here."""
        known = dict(self.progress)
        for beat in self._others.values():
            known.update({int(rank): mark for rank, mark in beat["progress"].items()})
        return known

    def report_end(self, failure: UserError | None) -> None:
        """Tell the other machines how it ended here. Machine 0, whose store they need, waits until they have heard."""
        if self.nodes == 1:
            return
        code = 0 if failure is None else failure.exit_code
        self._state = {"state": DONE if failure is None else FAILED, "code": code, "message": str(failure or "")}
        end = time.monotonic() + LINGER_SECONDS
        wakes = time.monotonic() + 2 * BEAT_SECONDS
        while time.monotonic() < end:
            others_run = any(self._is_running(node) for node in self._others)
            if time.monotonic() > wakes and not (self.node == 0 and others_run):
                break
            time.sleep(0.1)
        self._ends.set()

    def _is_running(self, node: int) -> bool:
        return self._others[node]["state"] == RUNS

    def _beat_until_end(self) -> None:
        count = 0
        while not self._ends.wait(BEAT_SECONDS if count else 0):
            count += 1
            beat = {"count": count, "processes": self._processes, "progress": self.progress, **self._state}
            try:
                self._store.set(f"beat/{self.node}", json.dumps(beat))
                self._read_others()
                self._reached_store = time.monotonic()
            except Exception:  # noqa: S112  whatever the store raises: that it is not reached is what counts
                continue

    def _read_others(self) -> None:
        for node in range(self.nodes):
            key = f"beat/{node}"
            if node != self.node and self._store.check([key]):
                beat = json.loads(self._store.get(key))
                if beat != self._others.get(node):
                    self._last_news[node] = time.monotonic()
                self._others[node] = beat


@contextlib.contextmanager
def join_cluster(
    nodes: int, node: int, processes: int, master_addr: str, master_port: int, start_timeout: float
) -> Iterator[Cluster]:
    """Meet the other machines.

    On one machine nothing listens on another interface than the loopback one.

    Raises:
        ProcessError: the port is taken, the address is not this machine's, or a machine does not come.
    """
    if nodes * processes == 1:
        yield Cluster(1, 0, 1, {}, None)
        return
    family, address = _resolve(master_addr)
    if nodes > 1 and ipaddress.ip_address(address).is_loopback:
        raise ProcessError(
            f"MASTER_ADDR={master_addr} is {address}, which every machine calls itself; give the address by which the "
            "other machines reach machine 0"
        )
    # Imported here: a run of one process starts without it.
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=OPERATION_SECONDS)
    if node == 0:
        listener = _listen(family, address, master_port, master_addr)
        port = listener.getsockname()[1]
        store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
        own_address = address
    else:
        port = master_port
        print(f"waiting for machine 0 at {master_addr}:{port}", flush=True)
        store = _connect(TCPStore, address, port, start_timeout)
        own_address = _find_own_address(family, address, port)
    environment = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # torch's own word for: the store is there already, in the launcher.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count_cores() // processes))),
    }
    # Left to themselves, gloo and NCCL may take an interface by which the others do not reach this machine.
    interface = _find_interface(own_address)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment[name] = os.environ.get(name, interface)
    cluster = Cluster(nodes, node, processes, environment, store)
    cluster.start(start_timeout)
    yield cluster


def _resolve(master_addr: str) -> tuple[int, str]:
    try:
        found = socket.getaddrinfo(master_addr, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ProcessError(f"MASTER_ADDR={master_addr}: no such host ({error.strerror or error})") from error
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address[0]


def _listen(family: int, address: str, port: int, master_addr: str) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OverflowError):
            raise ProcessError(f"MASTER_PORT={port}: a port is a number up to 65535") from error
        if isinstance(error, PermissionError) or "in use" in str(error):
            raise ProcessError(
                f"port {port} on {master_addr} cannot be used ({error.strerror}); choose another MASTER_PORT, or on "
                "one machine none, which takes a free one"
            ) from error
        raise ProcessError(
            f"MASTER_ADDR={master_addr} is not an address of this node ({error.strerror}), which NODE_RANK=0 makes it"
        ) from error
    return listener


def _connect(store_class, address: str, port: int, timeout: float):
    try:
        store = store_class(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ProcessError(
            f"machine 0 at {address}:{port} did not answer within {timeout:g} s. Start run.sh there with NODE_RANK=0, "
            "and let the port through its firewall."
        ) from error
    store.set_timeout(timedelta(seconds=OPERATION_SECONDS))
    return store


def _find_own_address(family: int, address: str, port: int) -> str:
    """The address by which this machine reaches another; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return probe.getsockname()[0]


def _find_interface(address: str) -> str | None:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
