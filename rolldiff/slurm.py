"""What SLURM says of a job, and what a job asks of SLURM.

With `--signal=USR1@120`, SLURM sends SIGUSR1 to the tasks of a job two minutes before its time is
over. A training then saves, and asks to be queued again. The job that starts again runs the same
command, and goes on with the run that it had begun.
"""

import os
import signal
import subprocess
from collections.abc import Mapping

from rolldiff.errors import UsageError, warn_user

__all__ = ["REQUEUE", "is_task", "job", "requeue", "restarted", "signals", "task_environment"]

REQUEUE = "SIGUSR1"  # the name of the signal before the end


def job() -> str | None:
    """The number of the job that this process belongs to; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def signals() -> tuple[int, ...]:
    """The signals that SLURM sends before the end, beside SIGTERM."""
    return () if job() is None else (getattr(signal, REQUEUE),)


def is_task() -> bool:
    """Whether this process is one of several tasks of a step of srun.

    The script of a batch job and an interactive shell are none, though SLURM tells them the number
    of tasks that they may start.
    """
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def task_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would set for a task of srun.

    Raises:
        UsageError: if there are different numbers of tasks on the nodes.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    size, nodes = (int(environment[f"SLURM_STEP_NUM_{what}"]) for what in ("TASKS", "NODES"))
    if size % nodes:
        raise UsageError(
            f"srun must start as many tasks on every node, got {size} tasks on {nodes} nodes; say "
            "--ntasks-per-node"
        )
    first = SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"])
    port = 15000 + int(environment["SLURM_JOB_ID"]) % 10000  # the same for all, and as Lightning's
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "GROUP_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def restarted() -> bool:
    """Whether the job was queued again, after its end or by an administrator."""
    return job() is not None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def requeue() -> None:
    """Ask SLURM to queue this job again; a warning says why it cannot."""
    command = ["scontrol", "requeue", str(job())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        warn_user(f"the job is not queued again: {' '.join(command)}: {error.strerror}")
        return
    if done.returncode:
        warn_user(f"the job is not queued again: {' '.join(command)}: {done.stderr.strip()}")
