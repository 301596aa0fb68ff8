"""Run algorithms on tasks, several seeds each, and keep what they report as data.

python benchmarks/run.py --algos ppo_continuous --env-ids Walker2d-v4 HalfCheetah-v4 --num-seeds 5
python benchmarks/run.py --jobs 2 -- --env-threads 1        # two processes at a time; after -- arguments of the scripts
python benchmarks/run.py --launcher ray --ray-address auto --job-cpus 4       # the same matrix on a Ray cluster
python benchmarks/run.py --add-fingerprint                  # to results that have none and whose script is as it was

One process per algorithm and task trains all its seeds. What is complete is skipped, and nothing is written over the
result of another command; what was cut off goes on from its last checkpoint, unless its script computes something else
by now; what fails is reported with the end of its output, the others go on, and the exit status is 1. A result is
benchmarks/results/<algo>/<task>/: metrics.csv of all seeds, and run.json (what ran, of which version, on what, where it
was resumed, and the fingerprint of the script, by which report.py --check tells what is stale).

With --launcher ray, jobs go where their share of cores and GPUs is free; the share is what Ray counts by, it binds
nothing, so pass threads to match (-- --env-threads 4). Workers need the packages, not the project. A lost worker's job
is started again, from its last checkpoint where its disk is still there. Results are gathered here.
"""

import contextlib
import csv
import fcntl
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import tyro
from fingerprint import circumstances, fingerprint, flags, is_discrete, named
from reading import OF_A_CELL, SET_ASIDE, read_rows

ROOT = Path(__file__).resolve().parent.parent
MUJOCO_TASKS = (
    "Walker2d-v4",
    "HalfCheetah-v4",
    "Hopper-v4",
    "Ant-v4",
    "InvertedDoublePendulum-v4",
    "InvertedPendulum-v4",
    "Reacher-v4",
    "Swimmer-v4",
    "Humanoid-v4",
)
# Arguments of the scripts that run.py sets itself
OWN_ARGUMENTS = {"env_id", "num_seeds", "seed", "total_timesteps", "run_dir", "resume", "evaluate"}


@dataclass
class Args:
    algos: tuple[str, ...] = ("ppo_continuous",)  # scripts of algos/, without .py
    env_ids: tuple[str, ...] = MUJOCO_TASKS  # tasks
    num_seeds: int = 5  # seeds of each cell, side by side in one process
    seed: int = 11  # the first of them; no choice of a default has seen seeds 11 to 15
    total_timesteps: int = 1_000_000  # environment steps per seed
    jobs: int = 1  # processes at a time, of the local launcher
    launcher: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a Ray cluster
    ray_address: str | None = None  # a running cluster (HOST:PORT, or auto); without one, a cluster of this machine
    job_cpus: float = 1  # Ray: share of each job in the cores
    job_gpus: float = 0  # and in the GPUs; without one it trains on the CPU
    retries: int = 3  # Ray: times that a job whose worker is lost starts again
    add_fingerprint: bool = False  # run no matrix; give a fingerprint to results of `algos` that have none
    run_dir: Path = ROOT / "runs" / "benchmark"  # where the runs themselves stay
    results: Path = ROOT / "benchmarks" / "results"  # where their data is gathered


@dataclass
class Job:
    """One cell of the matrix: all seeds of an algorithm on a task."""

    algo: str
    env_id: str
    args: Args
    extra: list[str]
    first_step: int = 0  # where an earlier, cut-off process left it
    sha256: str = ""  # of the script as started
    fingerprint: dict[str, float] | None = None
    lock: IO[str] | None = None  # held by whoever trains this cell

    @property
    def script(self) -> Path:
        return ROOT / "algos" / f"{self.algo}.py"

    @property
    def cell(self) -> Path:
        return Path(self.algo, self.env_id.replace("/", "_"))

    @property
    def runs(self) -> Path:
        return self.args.run_dir / self.cell

    @property
    def result(self) -> Path:
        return self.args.results / self.cell

    @property
    def command(self) -> list[str]:
        named = {"env-id": self.env_id, "num-seeds": self.args.num_seeds, "seed": self.args.seed}
        named |= {"total-timesteps": self.args.total_timesteps}
        words = [f"algos/{self.algo}.py"]
        for name, value in named.items():
            words += [f"--{name}", str(value)]
        return words + self.extra

    @property
    def arguments(self) -> list[str]:
        """Of the script, to start it or go on with it."""
        return [*self.command[1:], "--run-dir", str(self.runs), "--resume", "auto"]

    @property
    def output(self) -> Path:
        return self.runs / "output.txt"

    def folders(self) -> list[Path]:
        """The run's folders, in the order of the seeds; empty before it has written its metrics. The script says which
        the first one is, on a line of its own: with `--resume auto` it is not always the newest."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        first = Path(next((line for line in lines if line.startswith(f"{self.runs}/")), "nowhere"))
        head, _, rest = first.name.partition(f"__{self.args.seed}__")
        seeds = range(self.args.seed, self.args.seed + self.args.num_seeds)
        found = [first.parent / f"{head}__{seed}__{rest}" for seed in seeds]
        return found if all((folder / "metrics.csv").exists() for folder in found) else []

    def claim(self) -> bool:
        """Whether this cell is ours to train. Its process inherits the lock, so a harness that was killed does not give
        it free while what it started still writes there."""
        self.lock = open(self.runs.with_name(f"{self.runs.name}.lock"), "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            return False
        except OSError:  # the file system has no locks
            pass
        return True

    def set_other_runs_aside(self) -> None:
        """Go on with runs only of the same script, or of one whose fingerprint is the same to the last digit (where a
        comment was changed), for as many steps: what the learning rate has fallen to by the end of a shorter run is no
        start for a longer one. A folder of others is renamed. A fingerprint speaks for runs with its flags only."""
        note, now = self.runs / "started.json", {"total_timesteps": self.args.total_timesteps, "sha256": self.sha256}
        own = " ".join(flags(self.extra))
        started = {own}  # with these flags, runs may lie there
        if note.exists():
            then = json.loads(note.read_text())
            started |= set(then.get("flags", []))
            same_numbers = self.fingerprint is not None and then["fingerprint"] == self.fingerprint
            same_script = then["sha256"] == self.sha256 or (same_numbers and started == {own})
            if not same_script or then["total_timesteps"] != self.args.total_timesteps:
                self.runs.rename(self.runs.with_name(f"{self.runs.name}.{SET_ASIDE}{note.stat().st_mtime_ns}"))
                started = {own}
        self.runs.mkdir(parents=True, exist_ok=True)
        write_json(note, now | {"fingerprint": self.fingerprint, "flags": sorted(started)})

    def steps(self) -> int:
        """Environment steps per seed done so far."""
        folders = self.folders()
        rows = read_rows(folders[0] / "metrics.csv") if folders else []
        return int(rows[-1]["global_step"]) if rows else 0

    def gather(self, how: dict[str, Any]) -> None:
        """Copy what the runs reported into the results folder, with `how` they were run."""
        rows, folders = [], self.folders()
        for folder in folders:
            seed = json.loads((folder / "config.json").read_text())["args"]["seed"]
            rows += [{"seed": seed, **row} for row in read_rows(folder / "metrics.csv")]
        config = json.loads((folders[0] / "config.json").read_text())
        for private in ("run_dir", "resume", "evaluate"):
            config["args"].pop(private)
        config |= {"command": "python " + " ".join(self.command), **how}
        if self.fingerprint and config["script_sha256"] == self.sha256:  # else it was edited between the two
            config["fingerprint"] = self.fingerprint
        write_result(self.result, rows, config)


class Launcher(Protocol):
    """Where jobs run: `slots` of them at a time."""

    slots: int

    def start(self, job: Job) -> None: ...

    def poll(self, job: Job) -> int | None:
        """The exit status, None while it runs. Then the job's output and its runs' files are here."""

    def stop(self) -> None:
        """End what still runs: the scripts save a checkpoint, from which the same command goes on."""

    def how(self) -> dict[str, Any]:
        """What a result says of how it was run."""


@dataclass
class LocalLauncher:
    """Processes of this machine."""

    slots: int
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)  # by id of the job

    def start(self, job: Job) -> None:
        with open(job.output, "w") as output:
            words, held = [sys.executable, str(job.script), *job.arguments], [job.lock.fileno()]
            self.processes[id(job)] = subprocess.Popen(
                words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, pass_fds=held
            )

    def poll(self, job: Job) -> int | None:
        return self.processes[id(job)].poll()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait()

    def how(self) -> dict[str, Any]:
        return {"jobs_at_a_time": self.slots}


def make_launcher(args: Args, jobs: int) -> Launcher:
    if args.launcher == "local":
        return LocalLauncher(args.jobs)
    from ray_launcher import RayLauncher  # Ray is optional

    return RayLauncher(jobs, args.ray_address, args.job_cpus, args.job_gpus, args.retries)


def write_result(folder: Path, rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """Beside and renamed, run.json last: a result with a run.json is complete, and a full disk leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "metrics.tmp"
    with open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "run.tmp").write_text(as_json(meta))
    (folder / "run.json").unlink(missing_ok=True)
    beside.replace(folder / "metrics.csv")
    (folder / "run.tmp").replace(folder / "run.json")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Beside and renamed, so that a kill leaves a whole file."""
    path.with_suffix(".tmp").write_text(as_json(content))
    path.with_suffix(".tmp").replace(path)


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def digest(script: Path) -> str:
    return hashlib.sha256(script.read_bytes()).hexdigest()


def is_complete(job: Job) -> bool:
    """Whether this very command's result is there. What decides nothing of what is learned, threads and the like, does
    not make it another, nor does a changed script: report.py tells what is stale."""
    names = "|".join(name.replace("_", "[-_]") for name in OF_A_CELL - {"env_id", "save_replay"})
    any_will_do = re.compile(rf" --(no[-_])?({names})(?![-_\w])([ =](?!--)\S+)?")
    wanted = any_will_do.sub("", "python " + " ".join(job.command))
    return any_will_do.sub("", gathered(job).get("command", "")) == wanted


def gathered(job: Job) -> dict[str, Any]:
    """The run.json of this cell; empty if there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((job.result / "run.json").read_text())
        return meta if isinstance(meta, dict) else {}
    return {}


def fingerprint_or_none(script: Path, discrete: bool, own: tuple[str, ...]) -> dict[str, float] | None:
    try:
        return fingerprint(script, discrete, own)
    except RuntimeError as error:  # its results are kept; report.py --check will say that they have none
        print(f"no fingerprint: {error}", flush=True)
        return None


def add_fingerprints(args: Args) -> int:
    """Give results without a fingerprint that of today's script, if it is byte for byte the one that made them."""
    refused = 0
    for algo in args.algos:
        script = ROOT / "algos" / f"{algo}.py"
        for path in sorted((args.results / algo).glob("*/run.json")):
            meta = json.loads(path.read_text())
            if "fingerprint" in meta:
                print(f"{algo} on {path.parent.name}: has one")
            elif meta.get("script_sha256") != digest(script):
                print(f"{algo} on {path.parent.name}: refused, {script.name} has changed since")
                refused += 1
            elif numbers := fingerprint_or_none(script, *circumstances(meta)):
                write_json(path, meta | {"fingerprint": numbers})
                print(f"{algo} on {path.parent.name}: added")
            else:
                refused += 1
    return 1 if refused else 0


def run_matrix(matrix: list[Job], launcher: Launcher, args: Args) -> int:
    """Run what is not complete; the number of jobs that failed."""
    waiting = [job for job in matrix if not is_complete(job)]
    running: list[Job] = []
    done, failed = len(matrix) - len(waiting), 0
    fingerprints: dict[tuple, dict[str, float] | None] = {}  # by the script's hash and the kind of task
    print(f"{len(matrix)} cells, {done} of them complete", flush=True)
    for algo in dict.fromkeys(job.algo for job in matrix):
        old = [job for job in matrix if job.algo == algo and job not in waiting]
        if any(gathered(job).get("script_sha256") != digest(job.script) for job in old):
            print(f"{algo}.py has changed since: report.py --check tells whether in what it computes", flush=True)
    began, finished_steps = time.monotonic(), 0
    while waiting or running:
        while waiting and len(running) < launcher.slots:
            job = waiting.pop(0)
            try:
                if not job.claim():
                    failed += 1
                    print(f"{job.algo} on {job.env_id}: left out, another process trains it in {job.runs}", flush=True)
                    continue
                if is_complete(job):  # by another process, meanwhile
                    done += 1
                    job.lock.close()
                    continue
                job.sha256 = digest(job.script)
                key = job.sha256, is_discrete(job.env_id)
                if key not in fingerprints:
                    fingerprints[key] = fingerprint_or_none(job.script, is_discrete(job.env_id), flags(job.extra))
                job.fingerprint = fingerprints[key]
                job.set_other_runs_aside()
                job.first_step = job.steps()
                launcher.start(job)
            except OSError as error:
                failed += 1
                print(f"{job.algo} on {job.env_id}: cannot be started: {error}", flush=True)
                continue
            running.append(job)
        time.sleep(1)
        for job, status in [(job, launcher.poll(job)) for job in running]:
            if status is None:
                continue
            running.remove(job)
            finished_steps += args.total_timesteps - job.first_step
            if status == 0 and job.folders():
                try:
                    job.gather(launcher.how())
                    done += 1
                    print(f"\r{job.algo} on {job.env_id}: {done} of {len(matrix)} cells complete", flush=True)
                except OSError as error:
                    failed += 1
                    print(f"\r{job.algo} on {job.env_id}: trained, but the result is not written: {error}", flush=True)
            else:
                failed += 1
                print(f"\r{job.algo} on {job.env_id}: failed with exit status {status}", flush=True)
                print("    " + "\n    ".join(job.output.read_text(errors="replace").splitlines()[-10:]), flush=True)
            job.lock.close()
        steps = finished_steps + sum(job.steps() - job.first_step for job in running)
        left = sum(args.total_timesteps - job.steps() for job in running) + args.total_timesteps * len(waiting)
        if sys.stdout.isatty() and steps:
            minutes = (time.monotonic() - began) / 60 * left / steps
            print(f"\r{done} of {len(matrix)} cells, about {minutes:.0f} min left   ", end="", flush=True)
    return failed


def refuse(message: str) -> int:
    print(f"run.py: error: {message}", file=sys.stderr)
    return 2


def end(*_: Any) -> None:
    """On SIGTERM, end as Ctrl-C does; a second one must not disturb the wait for the jobs' checkpoints."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def main(args: Args, extra: list[str]) -> int:
    for algo in args.algos:
        if not (ROOT / "algos" / f"{algo}.py").exists():
            return refuse(f"there is no algos/{algo}.py")
    if args.jobs < 1 or args.num_seeds < 1 or args.retries < 0 or args.job_cpus < 0 or args.job_gpus < 0:
        return refuse("jobs and num-seeds are at least 1, retries and shares at least 0")
    if args.add_fingerprint:
        return add_fingerprints(args)
    args.run_dir = args.run_dir.resolve()  # Ray's workers have other working directories
    if own := named(extra) & OWN_ARGUMENTS:
        return refuse(f"{min(own)} is run.py's own: it goes before the --, or is set by it")
    table = (args.seed, args.num_seeds, args.total_timesteps) == (Args.seed, Args.num_seeds, Args.total_timesteps)
    if args.results.resolve() == Args.results and not (table and named(extra) <= OF_A_CELL):
        seeds = f"seeds {Args.seed} to {Args.seed + Args.num_seeds - 1}"
        what = f"{Args.total_timesteps:,} steps, {seeds}, by default settings"
        return refuse(f"the table there is of {what}: give --results another folder")
    cells = dict.fromkeys((algo, env_id) for algo in args.algos for env_id in args.env_ids)
    matrix = [Job(algo, env_id, args, extra) for algo, env_id in cells]
    if others := [job.result for job in matrix if gathered(job) and not is_complete(job)]:
        return refuse(f"{others[0]} is the result of another command: delete it, or give --results another folder")
    try:
        for job in matrix:
            job.result.mkdir(parents=True, exist_ok=True)
            job.runs.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refuse(f"{error.filename} cannot be made: {error.strerror}")
    try:
        launcher = make_launcher(args, len(matrix))
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        return refuse("--launcher ray needs Ray, which is not installed: pip install ray")
    except (ConnectionError, ValueError) as error:
        return refuse(f"Ray: {error}")
    signal.signal(signal.SIGTERM, end)
    try:
        failed = run_matrix(matrix, launcher, args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoints")
        return 128 + signal.SIGINT
    finally:
        launcher.stop()
    if failed:
        print(f"{failed} of {len(matrix)} cells failed")
    return 1 if failed else 0


if __name__ == "__main__":
    words, extra = sys.argv[1:], []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    sys.exit(main(tyro.cli(Args, args=words), extra))
