"""Run algorithms on tasks, several seeds each, and keep what they report as data.

python benchmarks/run.py --algos ppo_continuous --env-ids Walker2d-v4 HalfCheetah-v4 --num-seeds 5
python benchmarks/run.py --jobs 2 -- --env-threads 1        # two processes at a time; after -- arguments of the scripts

One process per algorithm and task trains all its seeds. What is complete is skipped; what was cut off goes on from its
last checkpoint; what fails is reported with the end of its output, the others go on, and the exit status is 1. A result
is benchmarks/results/<algo>/<task>/: metrics.csv of all seeds, and run.json (what ran, of which version, on what).
"""

import csv
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
MUJOCO_TASKS = ("Walker2d-v4", "HalfCheetah-v4", "Hopper-v4", "Ant-v4", "InvertedDoublePendulum-v4")


@dataclass
class Args:
    algos: tuple[str, ...] = ("ppo_continuous",)  # scripts of algos/, without .py
    env_ids: tuple[str, ...] = MUJOCO_TASKS  # tasks
    num_seeds: int = 5  # seeds of each cell, side by side in one process
    seed: int = 1  # the first of them
    total_timesteps: int = 1_000_000  # environment steps per seed
    jobs: int = 1  # processes at a time
    run_dir: Path = ROOT / "runs" / "benchmark"  # where the runs themselves stay
    results: Path = ROOT / "benchmarks" / "results"  # where their data is gathered


@dataclass
class Job:
    """One cell of the matrix: all seeds of an algorithm on a task."""

    algo: str
    env_id: str
    args: Args
    extra: list[str]
    process: subprocess.Popen | None = None
    first_step: int = 0  # where an earlier, cut-off process left it

    @property
    def script(self) -> Path:
        return ROOT / "algos" / f"{self.algo}.py"

    @property
    def runs(self) -> Path:
        return self.args.run_dir / self.algo / self.env_id

    @property
    def result(self) -> Path:
        return self.args.results / self.algo / self.env_id

    @property
    def command(self) -> list[str]:
        named = {"env-id": self.env_id, "num-seeds": self.args.num_seeds, "seed": self.args.seed}
        named |= {"total-timesteps": self.args.total_timesteps}
        words = [f"algos/{self.algo}.py"]
        for name, value in named.items():
            words += [f"--{name}", str(value)]
        return words + self.extra

    def start(self) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, str(self.script), *self.command[1:], "--run-dir", str(self.runs), "--resume", "auto"]
        self.first_step = self.steps()
        with open(self.runs / "output.txt", "w") as output:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def folders(self) -> list[Path]:
        """The run's folders, in the order of the seeds; empty before it has written its metrics. The script says on its
        second line which they are: with `--resume auto` it is not always the newest."""
        output = self.runs / "output.txt"
        lines = output.read_text().splitlines() if output.exists() else []
        first = Path(lines[1]) if len(lines) > 1 else Path("nowhere")
        head, _, rest = first.name.partition(f"__{self.args.seed}__")
        seeds = range(self.args.seed, self.args.seed + self.args.num_seeds)
        found = [first.parent / f"{head}__{seed}__{rest}" for seed in seeds]
        return found if all((folder / "metrics.csv").exists() for folder in found) else []

    def steps(self) -> int:
        """Environment steps per seed done so far."""
        folders = self.folders()
        rows = read_rows(folders[0] / "metrics.csv") if folders else []
        return int(rows[-1]["global_step"]) if rows else 0

    def gather(self) -> None:
        """Copy what the runs reported into the results folder."""
        rows = []
        for folder in self.folders():
            seed = json.loads((folder / "config.json").read_text())["args"]["seed"]
            rows += [{"seed": seed, **row} for row in read_rows(folder / "metrics.csv")]
        config = json.loads((self.folders()[0] / "config.json").read_text())
        for private in ("run_dir", "resume", "evaluate"):
            config["args"].pop(private)
        config |= {"command": "python " + " ".join(self.command), "jobs_at_a_time": self.args.jobs}
        config["script_sha256"] = hashlib.sha256(self.script.read_bytes()).hexdigest()
        self.result.mkdir(parents=True, exist_ok=True)
        with open(self.result / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        # last, and at once: a result with a run.json is complete
        (self.result / "run.tmp").write_text(json.dumps(config, indent=2) + "\n")
        (self.result / "run.tmp").replace(self.result / "run.json")


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def is_complete(job: Job) -> bool:
    """Whether this very command's result is there. A changed script does not count: report.py tells what is stale."""
    path = job.result / "run.json"
    return path.exists() and json.loads(path.read_text())["command"] == "python " + " ".join(job.command)


def main(args: Args, extra: list[str]) -> int:
    for algo in args.algos:
        if not (ROOT / "algos" / f"{algo}.py").exists():
            print(f"run.py: error: there is no algos/{algo}.py", file=sys.stderr)
            return 2
    matrix = [Job(algo, env_id, args, extra) for algo in args.algos for env_id in args.env_ids]
    waiting = [job for job in matrix if not is_complete(job)]
    running: list[Job] = []
    failed: list[Job] = []
    done = len(matrix) - len(waiting)
    print(f"{len(matrix)} cells, {done} of them complete", flush=True)
    began, finished_steps = time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(1)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                finished_steps += args.total_timesteps - job.first_step
                if job.process.returncode == 0:
                    job.gather()
                    done += 1
                    print(f"\r{job.algo} on {job.env_id}: {done} of {len(matrix)} cells complete", flush=True)
                else:
                    failed.append(job)
                    print(f"\r{job.algo} on {job.env_id}: failed with exit status {job.process.returncode}", flush=True)
                    print("    " + "\n    ".join((job.runs / "output.txt").read_text().splitlines()[-10:]), flush=True)
            steps = finished_steps + sum(job.steps() - job.first_step for job in running)
            left = sum(args.total_timesteps - job.steps() for job in running) + args.total_timesteps * len(waiting)
            if sys.stdout.isatty() and steps:
                minutes = (time.monotonic() - began) / 60 * left / steps
                print(f"\r{done} of {len(matrix)} cells, about {minutes:.0f} min left   ", end="", flush=True)
    finally:  # Ctrl-C: the scripts save a checkpoint, from which the same command goes on
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    return 1 if failed else 0


if __name__ == "__main__":
    words, extra = sys.argv[1:], []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    sys.exit(main(tyro.cli(Args, args=words), extra))
