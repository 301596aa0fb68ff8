"""Read what runs leave: gathered results (run.json and metrics.csv of all seeds), and the run folders themselves."""

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Arguments of scripts that decide nothing of what is learned
OF_THE_MACHINE = {"env_threads", "torch_threads", "checkpoint_seconds", "capture_video"}
SET_ASIDE = "set-aside-"  # how run.py marks folders of runs that it does not go on with, before a number
OF_A_CELL = OF_THE_MACHINE | {"env_id", "device", "cuda_graphs", "compile", "save_replay"}  # may differ in the table


def differing(a: dict[str, Any], b: dict[str, Any], but: set[str]) -> list[str]:
    """Names of the arguments, `but` these, in which two runs differ, or that one only has."""
    return sorted(name for name in (a | b).keys() - but if a.get(name, ...) != b.get(name, ...))


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def in_whole_episodes(args: dict[str, Any]) -> bool:
    """Whether this is REINFORCE on whole episodes, whose batches have lengths of their own."""
    return args.get("baseline") in ("none", "mean")


def finished(step: int, args: dict[str, Any], trained_timesteps: int) -> bool:
    """Whether a run that has come to this step is at its end. REINFORCE on whole episodes ends where another batch of
    the longest ones might not fit."""
    if in_whole_episodes(args):
        return step > args["total_timesteps"] - args["num_envs"] * args["horizon"]
    return step == trained_timesteps


def resumptions(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a run, or any of the processes of a joined result, was resumed, and what it was before."""
    return [each for own in (meta, *meta.get("processes", [])) for each in own.get("resumed", [])]


def refilled(meta: dict[str, Any]) -> bool:
    """Whether DDPG or SAC was resumed without its replay: while that is refilled, nothing is learned."""
    went_on = any(each["at_step"] < meta["trained_timesteps"] for each in resumptions(meta))
    return went_on and meta["args"].get("save_replay") is False


def extended(meta: dict[str, Any]) -> bool:
    """Whether it was made longer when it was resumed."""
    earlier = [each.get("before", {}).get("trained_timesteps") for each in resumptions(meta)]
    return any(steps not in (None, meta["trained_timesteps"]) for steps in earlier)


def seeds_together(meta: dict[str, Any]) -> int:
    """Seeds in a process: a joined result has several processes."""
    return meta["args"]["num_seeds"] // max(len(meta.get("processes", [])), 1)


def scripts(meta: dict[str, Any]) -> frozenset[str]:
    """Hashes of all scripts that a run, or a joined result, was trained with."""
    parts = [meta, *meta.get("processes", []), *(each.get("before", {}) for each in resumptions(meta))]
    return frozenset(part["script_sha256"] for part in parts if part.get("script_sha256"))


def versions(meta: dict[str, Any]) -> list[dict[str, str]]:
    """Of Python and the packages that decide what is learned: now, and before each resumption."""
    earlier = [each.get("before", {}).get("versions") for each in resumptions(meta)]
    return [meta.get("versions") or {}, *(own for own in earlier if own)]


def read_result(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """The columns of a result by seed. Raises ValueError, naming the folder, if it is cut off or inconsistent."""
    with naming(folder):
        return checked_result(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with what is read in here: a ValueError that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: there is no {error}") from None
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def checked_result(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    meta, rows = json.loads((folder / "run.json").read_text()), read_rows(folder / "metrics.csv")
    seeds: dict[int, dict[str, np.ndarray]] = {}
    for seed in sorted({int(row["seed"]) for row in rows}):
        own = [row for row in rows if row["seed"] == str(seed)]
        if any(value is None for row in own for value in row.values()):
            raise ValueError(f"a row of seed {seed} is cut off")
        seeds[seed] = {
            name: np.array([float(row[name]) if row[name] else np.nan for row in own])
            for name in own[0]
            if name != "seed"
        }
        last = {name: column[-1] for name, column in seeds[seed].items()}
        if not finished(int(last["global_step"]), meta["args"], meta["trained_timesteps"]):
            raise ValueError(f"seed {seed} ends at step {last['global_step']:.0f}, not {meta['trained_timesteps']}")
        if not np.isfinite([last["eval_return"], last["episodic_return"]]).all():
            raise ValueError(f"seed {seed} has no return of an evaluation or of training at its end")
    if not in_whole_episodes(meta["args"]) and len({tuple(columns["global_step"]) for columns in seeds.values()}) > 1:
        raise ValueError("its seeds have reported at different steps")
    if len({np.isfinite(columns["eval_return"]).sum() for columns in seeds.values()}) > 1:
        raise ValueError("its seeds have different numbers of evaluations")
    first, count = meta["args"]["seed"], meta["args"]["num_seeds"]
    if list(seeds) != list(range(first, first + count)):
        raise ValueError(f"its seeds are {list(seeds)}, not {count} from {first} on")
    return seeds


def origin(meta: dict[str, Any]) -> dict[str, Any]:
    """What a Run says of how it came about."""
    parts = (versions, refilled, extended, seeds_together, scripts)
    return {part.__name__: part(meta) for part in parts}


@dataclass
class Run:
    """What a comparison needs of one trained seed."""

    folder: Path
    args: dict[str, Any]
    trained_timesteps: int
    final: float  # mean return of the last evaluation, NaN if the run has not come to it, or has diverged
    diverged: bool = False  # at its end, with nothing to show in an evaluation that was asked for
    started: int = 0  # seconds since 1970, of a run folder
    versions: list[dict[str, str]] = field(default_factory=list)  # of packages; several if resumed
    refilled: bool = False  # resumed without its replay
    extended: bool = False  # made longer when it was resumed
    seeds_together: int = 1  # in its process
    scripts: frozenset[str] = frozenset()  # hashes of what trained it: several if joined, or resumed with an edited one

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def task(self) -> str:
        """With its settings: another reward is another task."""
        settings = " ".join(f"{name} {value}" for name, value in sorted(self.args["env_kwargs"].items()))
        return self.args["env_id"] + (f" ({settings})" if settings else "")


def read_runs(folder: Path) -> list[Run]:
    """All runs in a folder: of gathered results (an algorithm's or a cell's), or of run folders as scripts leave them,
    at any depth, but for those that run.py has set aside. Raises ValueError, naming the file, for what cannot be read,
    and if there are none."""
    runs: list[Run] = []
    for path in sorted([*folder.glob("run.json"), *folder.glob("*/run.json")]):
        columns = read_result(path.parent)
        with naming(path):
            meta = json.loads(path.read_text())
            for seed, own in columns.items():
                args, final = meta["args"] | {"seed": seed}, float(own["eval_return"][-1])
                runs.append(Run(path.parent, args, meta["trained_timesteps"], final, **origin(meta)))
    for path in sorted(folder.rglob("config.json")):
        if any(f".{SET_ASIDE}" in part for part in path.relative_to(folder).parts):
            continue
        with naming(path):
            config = json.loads(path.read_text())
            if isinstance(config, dict) and "args" in config:  # else it is another tool's
                runs.append(read_run(path.parent, config))
    if not runs:
        raise ValueError(f"{folder}: there are no runs in it, nor results of one algorithm")
    return runs


def read_run(folder: Path, config: dict[str, Any]) -> Run:
    """A run folder as a script leaves it, with its config.json."""
    args, steps, metrics = config["args"], config["trained_timesteps"], folder / "metrics.csv"
    rows = read_rows(metrics) if metrics.exists() else []
    if any(value is None for row in rows for value in row.values()):
        raise ValueError(f"a row of {metrics.name} is cut off")
    ended = rows and finished(int(rows[-1]["global_step"]), args, steps)
    final = float(rows[-1]["eval_return"] or "nan") if ended else float("nan")
    diverged = bool(ended and args["num_evaluations"] and not np.isfinite(final))
    stamp = folder.name.rpartition("__")[2]
    started = int(stamp) if stamp.isdecimal() else 0
    final = float("nan") if diverged else final
    return Run(folder, args, steps, final, diverged, started, **origin(config))
