"""run.py's jobs as tasks of a Ray cluster; imported only with `--launcher ray`, because Ray is optional."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 would leave a job nothing beside any other process
import ray
from reading import SET_ASIDE


def end_with_parent() -> None:
    """Between fork and exec: when Ray's worker is killed, its training is killed too. It would otherwise go on beside
    the retry, both in the same run folder. (Linux only; PR_SET_PDEATHSIG is 1.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def train(script: bytes, path: Path, arguments: list[str], runs: Path, note: bytes) -> tuple[int, dict[str, bytes]]:
    """On a worker: run the script to its end. Returns its exit status and what is gathered, by path below `runs`.

    The worker may have this project at another version, or not at all: then what is run is the script as sent. On a
    disk of its own it may have runs of another script, or of another length: `note`, run.py's on what it goes on with,
    tells them apart."""
    started = runs / "started.json"
    if runs.exists() and not (started.exists() and started.read_bytes() == note):
        runs.rename(runs.with_name(f"{runs.name}.{SET_ASIDE}{time.time_ns()}"))
    runs.mkdir(parents=True, exist_ok=True)
    started.write_bytes(note)
    if not path.exists() or path.read_bytes() != script:
        path = runs / path.name
        path.write_bytes(script)
    with open(runs / "output.txt", "w") as output:
        words = [sys.executable, str(path), *arguments]
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)
        try:
            status = process.wait()
        finally:  # cancelled: the script saves a checkpoint
            process.terminate()
            process.wait()
    files = [runs / "output.txt", *runs.glob("*/config.json"), *runs.glob("*/metrics.csv")]
    return status, {str(file.relative_to(runs)): file.read_bytes() for file in files}


# Workers on other machines cannot import this file: the function itself travels.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class RayLauncher:
    """Tasks of a cluster. All are submitted at once; Ray starts them where their share is free, and starts again, up to
    `retries` times, what was on a worker or node that is lost. A script's own failure is not tried again."""

    def __init__(self, slots: int, address: str | None, cpus: float, gpus: float, retries: int) -> None:
        # the store need not hold more than tables; the dashboard is a dozen more processes
        own = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not address and not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in resources):
            ray.shutdown()
            raise ValueError(f"this machine does not have {cpus:g} cores and {gpus:g} GPUs, a job would wait for ever")
        self.slots, self.cpus, self.gpus = slots, cpus, gpus
        self.train = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(train)
        self.tasks: dict[int, ray.ObjectRef] = {}  # by id of the job

    def start(self, job: Any) -> None:
        note = (job.runs / "started.json").read_bytes()
        self.tasks[id(job)] = self.train.remote(job.script.read_bytes(), job.script, job.arguments, job.runs, note)

    def poll(self, job: Any) -> int | None:
        task = self.tasks[id(job)]
        if not ray.wait([task], timeout=0)[0]:
            return None
        try:
            status, files = ray.get(task)
        except ray.exceptions.RayError as error:
            with open(job.output, "a") as output:
                output.write(f"\n{error}\n")
            return -1
        for name, content in files.items():
            path = job.runs / name
            if not path.exists() or path.read_bytes() != content:  # it ran on another machine
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return status

    def stop(self) -> None:
        running = list(self.tasks.values())
        for task in running:
            ray.cancel(task)
        ray.wait(running, num_returns=len(running), timeout=60)
        ray.shutdown()

    def how(self) -> dict[str, Any]:
        return {"launcher": "ray", "job_cpus": self.cpus, "job_gpus": self.gpus}
