"""What launchers and schedulers say of a process in its environment, and what is left over there. Without torch.

Our launcher, torchrun, `accelerate launch`, `deepspeed` and a PyTorchJob set what torch reads: RANK, WORLD_SIZE,
MASTER_ADDR, …. What srun and mpirun say becomes that. What none of them means is taken away, and named.
"""

import ctypes
import ipaddress
import os
import re
import signal
import socket
import sys
import zlib
from collections.abc import Mapping, MutableMapping

from meme_llava.errors import UserError

# Settings of `accelerate launch` and NVIDIA's libraries, which would be followed in place of ours.
FOREIGN_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "NVIDIA_TF32_OVERRIDE")
# What a launcher says of a process that is one of several.
RANK_WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# By which it finds the others.
MEETING_WORDS = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# The first ones of Open MPI, of MPICH and Intel MPI, of MVAPICH. accelerate would follow them before torch's.
MPI_WORDS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
# What srun tells each of several processes, and how.
SLURM_WORDS = {
    **dict.fromkeys(("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"), r"[0-9]+"),
    "SLURM_STEP_TASKS_PER_NODE": r"[0-9]+.*",  # such as 4(x2),3
    "SLURM_STEP_NODELIST": r"[^\[,]+.*",  # such as node[03-05,09] or host-a,host-b
}
PR_SET_PDEATHSIG = 1


def settle_environment(variables: MutableMapping[str, str] = os.environ) -> None:
    """Prepare the environment for a process that trains, whoever started it. Raises UserError where it says that there
    are other processes, and not where."""
    ignored = {name for name in variables if name.startswith(FOREIGN_PREFIXES)}
    is_launched = variables.keys() >= MEETING_WORDS and variables["RANK"] == "0"
    if variables.get("WORLD_SIZE") in (None, "", "1") and not is_launched:
        ignored |= variables.keys() & set(RANK_WORDS)
    for name in ignored:
        del variables[name]
    read_slurm(variables)
    ignored |= read_mpi(variables)
    check_ranks(variables)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & variables.keys():
        # Every packed row has another length. Segments that can grow leave no gaps between blocks of all those lengths.
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if ignored and variables.get("RANK", "0") == "0":
        print(f"ignored: {', '.join(sorted(ignored))}; the launcher, --engine and --precision count", flush=True)
    if "RANK" in variables:
        variables.setdefault("LOCAL_RANK", "0")  # a PyTorchJob starts one process a machine
        die_with_parent()
        choose_interface(variables)


def read_slurm(variables: MutableMapping[str, str]) -> None:
    """Take the process's numbers from srun where it started several and no other launcher said any. Raises UserError
    where it said only a part."""
    # In a batch script, which srun did not start, SLURM_PROCID is there, too, but no step.
    tasks = variables.get("SLURM_STEP_NUM_TASKS")
    if "RANK" in variables or tasks in (None, "", "1"):
        return
    wrong = [name for name, form in SLURM_WORDS.items() if not re.fullmatch(form, variables.get(name, ""))]
    if wrong:
        found = f"is {variables[wrong[0]]!r}" if wrong[0] in variables else "is not set"
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks} says that srun started this process as one of several, but {wrong[0]} "
            f"{found}. Let srun start it with all that it sets, or unset SLURM_STEP_NUM_TASKS"
        )
    first = re.match(r"(\[.*?\]|[^,])+", variables["SLURM_STEP_NODELIST"])[0]
    on_nodes = re.findall(r"(?:^|,)(\d+)", variables["SLURM_STEP_TASKS_PER_NODE"])
    variables |= {
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": max(on_nodes, key=int),  # of the fullest node
    }
    variables.setdefault("MASTER_ADDR", re.sub(r"\[(\w+).*?\]", r"\1", first))
    variables.setdefault("MASTER_PORT", choose_port(f"{variables['SLURM_JOB_ID']}.{variables.get('SLURM_STEP_ID')}"))


def choose_port(job: str) -> str:
    """Where the processes of a job meet: jobs that share a node must not meet at one port."""
    return str(20000 + zlib.crc32(job.encode()) % 20000)


def read_mpi(variables: MutableMapping[str, str]) -> set[str]:
    """Take the process's numbers from mpirun where it started several and no other launcher said any; its words go in
    any case. Returns those that were not taken."""
    left = set()
    for names in MPI_WORDS:
        said = [variables.pop(name, None) for name in names]
        found = {name for name, value in zip(names, said, strict=True) if value is not None}
        if None in said or "RANK" in variables:
            left |= found
        elif said[2] != "1":
            variables |= zip(RANK_WORDS, said, strict=True)
            if said[2] == said[3]:  # all on this node
                variables.setdefault("MASTER_ADDR", "127.0.0.1")
                # Those of one job have one parent there.
                variables.setdefault("MASTER_PORT", choose_port(variables.get("PMIX_NAMESPACE", str(os.getppid()))))
    return left


def check_ranks(variables: Mapping[str, str]) -> None:
    """Raise UserError unless the words by which processes find each other are all there and sound, or none is."""
    if not {"RANK", "WORLD_SIZE"} & variables.keys():
        return
    wrong = [f"{name} is not set" for name in sorted(MEETING_WORDS) if not variables.get(name)]
    counts = {name: variables.get(name, "0") for name in (*RANK_WORDS, "MASTER_PORT")}
    wrong += [f"{name} is no whole number" for name, value in counts.items() if not value.isdecimal()]
    if not wrong and int(counts["RANK"]) >= int(counts["WORLD_SIZE"]):
        wrong.append("RANK counts from 0 to below WORLD_SIZE")
    if not wrong and int(counts["LOCAL_RANK"]) >= int(variables.get("LOCAL_WORLD_SIZE", counts["WORLD_SIZE"])):
        wrong.append("LOCAL_RANK counts from 0 to below LOCAL_WORLD_SIZE")
    if not wrong and not 0 < int(counts["MASTER_PORT"]) < 65536:
        wrong.append("MASTER_PORT is no port from 1 to 65535")
    if wrong:
        said = [
            f"{name}={variables[name]}" for name in (*RANK_WORDS, "MASTER_ADDR", "MASTER_PORT") if name in variables
        ]
        raise UserError(
            f"the environment says that this process is one of several ({' '.join(said)}), but {wrong[0]}. Unset what "
            "no launcher of this run has set (env -u RANK -u WORLD_SIZE …), or let run.sh, torchrun, srun or mpirun "
            "start it"
        )


def check_started_once(variables: Mapping[str, str]) -> None:
    """Raise UserError where a launcher or scheduler started several of run.sh, which starts processes itself."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *(names[2] for names in MPI_WORDS)):
        if variables.get(name) not in (None, "", "1"):
            raise UserError(
                f"{name}={variables[name]} says that run.sh was started several times at once, and it starts the "
                "processes of a node itself. Start it once on every node, with NNODES, NODE_RANK and MASTER_ADDR (in a "
                f"PyTorchJob: NNODES=$WORLD_SIZE NODE_RANK=$RANK bash run.sh); if {name} is left over, unset it"
            )


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends; see prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before this line
            os._exit(1)


def choose_interface(variables: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL talk where the other processes are; on one node that is the loopback interface. Raises
    UserError where MASTER_ADDR cannot be reached.

    Left to themselves, they may take an interface by which other nodes do not reach this one.
    """
    import psutil  # a bare Python, with which run.sh checks its settings, has none

    is_alone = variables["WORLD_SIZE"] == variables.get("LOCAL_WORLD_SIZE")
    other = "127.0.0.1" if is_alone else variables["MASTER_ADDR"]
    try:
        family, *_, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # which tells this node's own address towards the other; nothing is sent
            address = probe.getsockname()[0]
    except (OSError, UnicodeError) as error:  # the latter of a name that can be none
        raise UserError(
            f"MASTER_ADDR={other}: {getattr(error, 'strerror', None) or error}; expected the address by which this "
            "node reaches process 0"
        ) from error
    if not is_alone and variables["RANK"] == "0" and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return  # operators tell process 0 that it is at localhost, and the others where they reach it
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                variables.setdefault(name, interface)
            return
