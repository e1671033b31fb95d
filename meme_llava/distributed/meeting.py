"""Where a run's nodes meet: a torch.distributed store in node 0's launcher, which all processes use afterwards."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import TCPStore

from meme_llava.errors import ProcessError

LINGER_SECONDS = 10


@contextlib.contextmanager
def meet(nodes: int, node: int, processes: int, address: str, port: int, timeout: float) -> Iterator[int]:
    """Wait for the other nodes, and let node 0 leave last. Yields the port.

    On one node nothing listens on another interface than the address's, which torch by itself does not heed.

    Raises:
        ProcessError: the address is not node 0's, the port is taken, a node does not come, or starts another number
            of processes.
    """
    place, listener = f"MASTER_ADDR={address}, MASTER_PORT={port}", None
    if node == 0:
        listener = _listen(address, port, place)
        port = listener.getsockname()[1]
    if nodes > 1:
        print(f"node {node} waits for the other {nodes - 1}, at most {timeout:g} s", flush=True)
    try:
        store = TCPStore(
            address,
            port,
            world_size=nodes,
            is_master=node == 0,
            timeout=timedelta(seconds=timeout),
            master_listen_fd=listener.detach() if listener else None,
        )
        store.set(f"processes/{node}", str(processes))
        counts = [int(store.get(f"processes/{other}")) for other in range(nodes)]
    except RuntimeError as error:
        raise ProcessError(
            f"{place}: not all {nodes} nodes met within {timeout:g} s. Start run.sh on each of them with the same "
            "NNODES, MASTER_ADDR and MASTER_PORT and its own NODE_RANK, and let the port through node 0's firewall."
        ) from error
    if len(set(counts)) > 1:
        raise ProcessError(f"the nodes start {counts} processes, by NODE_RANK; give GPUS the same number on each")
    yield port
    with contextlib.suppress(RuntimeError):  # node 0 may be gone already, which the others need no more
        store.set(f"left/{node}", "")
        if node == 0:
            store.wait([f"left/{other}" for other in range(nodes)], timedelta(seconds=LINGER_SECONDS))


def _listen(address: str, port: int, place: str) -> socket.socket:
    try:
        family, *_, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found)
        listener.listen(1024)
    except OSError as error:
        raise ProcessError(
            f"{place}: {error.strerror}; node 0 needs an address of its own and a port that is free (on one node leave "
            "both out)"
        ) from error
    return listener


def check_address(address: str) -> None:
    """Raise ProcessError where other nodes could not reach node 0 at an address."""
    with contextlib.suppress(OSError):
        if ipaddress.ip_address(socket.gethostbyname(address)).is_loopback:
            raise ProcessError(
                f"MASTER_ADDR={address} is what every node calls itself; give the address by which the other nodes "
                "reach node 0"
            )
