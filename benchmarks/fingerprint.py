"""The numbers of a short fixed-seed run of a script: they say whether it still computes what its results came from.

A hash of the file would call a result stale when a comment changed; these numbers change when the computation or a
default does. run.py stores them with each result, report.py --check takes them again. A few seconds per script, and
per set of flags that results were trained with: `--baseline none` is other code than the default.
"""

import contextlib
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reading import read_rows

# Small and quick tasks: with bounded actions, so that all scripts take it, of several dimensions, whose sums are seen
# (the bounds are +-1, so scaling to others is not); and, for results on tasks of that kind, with discrete ones. The
# limit is about where episodes end by falling: both ends of one are seen.
CONTINUOUS, DISCRETE = ("Hopper-v4", 20), ("CartPole-v1", 15)
# Everything else is a default of the script: a default that changes is a change. One thread: sums in a fixed order.
ARGUMENTS = {"seed": 1, "num-seeds": 2, "device": "cpu", "env-threads": 1, "torch-threads": 1}
ARGUMENTS |= {"num-evaluations": 1, "final-eval-episodes": 4, "checkpoint-seconds": 1e6}
# What else a result's command may say without another computation of the script
NO_FLAGS = {*ARGUMENTS, "env-id", "env-kwargs", "total-timesteps", "learning-starts", "eval-episodes", "save-replay"}
NO_FLAGS |= {"run-dir", "resume", "capture-video", "exp-name", "compile", "no-compile", "no-cuda-graphs", "cuda-graphs"}
STEPS = {"ddpg": 512, "sac": 512}  # half of them before the first update; an update of theirs is dear
ON_POLICY_STEPS = 4096
# Rounding differs between processors and training amplifies it: torch without vector instructions
# (ATEN_CPU_CAPABILITY=default) moved no number by more than 1e-3, absolute or relative.
RELATIVE, ABSOLUTE = 0.01, 1e-3


def flags(words: list[str]) -> tuple[str, ...]:
    """Of the words of a command, the options that make a script compute something else, with their values."""
    kept: list[str] = []
    options = [word for text in words for word in (text.split("=", 1) if text.startswith("--") else [text])]
    keep = False
    for word in options:
        if word.startswith("--"):
            word = word.replace("_", "-")
            keep = word[2:] not in NO_FLAGS
        if keep:
            kept.append(word)
    return tuple(kept)


def circumstances(meta: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Kind of actions and flags of a gathered result, from its run.json: what `fingerprint` asks for."""
    return is_discrete(meta["args"]["env_id"]), flags(command(meta))


def command(meta: dict[str, Any]) -> list[str]:
    """The words after the script's name; the first one's of results that were joined, which differ in their seed."""
    return meta["command"].partition(";")[0].split()[2:]


def named(words: list[str]) -> set[str]:
    """The arguments that options among these words set: `--no-compile` sets compile."""
    options = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    return {option.removeprefix("no_") for option in options}


def is_discrete(env_id: str) -> bool:
    """Whether the task takes discrete actions; False for one that cannot be made, which the script will say."""
    import envpool
    import gymnasium

    with contextlib.suppress(Exception):
        return isinstance(envpool.make_spec(env_id).gymnasium_action_space, gymnasium.spaces.Discrete)
    return False


def fingerprint(script: Path, discrete: bool = False, own: tuple[str, ...] = ()) -> dict[str, float]:
    """Run a script of algos/, with flags of its own, on a small task with such actions: its returns, and mean and norm
    of every tensor that it trains, by name. Raises RuntimeError, with the end of its output, if it fails."""
    import torch  # takes seconds, which report.py without --check need not wait for

    task, limit = DISCRETE if discrete else CONTINUOUS
    arguments = ARGUMENTS | {"env-id": task, "total-timesteps": STEPS.get(script.stem, ON_POLICY_STEPS)}
    if script.stem in STEPS:
        arguments["learning-starts"] = STEPS[script.stem] // 2
    if "--baseline" in own:  # whole episodes, which must fit
        arguments["horizon"] = limit
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(script), *own, "--run-dir", folder]
        words += ["--env-kwargs", "max_episode_steps", str(limit)]
        for name, value in arguments.items():
            words += [f"--{name}", str(value)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{script.name} fails on {task}:\n{done.stdout[-1000:]}")
        numbers: dict[str, float] = {}
        for path in sorted(Path(folder).glob("*/metrics.csv")):
            seed = path.parent.name.split("__")[-2]
            rows = read_rows(path)
            returns = [float(row["episodic_return"]) for row in rows if row["episodic_return"]]
            numbers[f"seed {seed}: steps"] = float(rows[-1]["global_step"])
            numbers[f"seed {seed}: mean training return"] = sum(returns) / max(len(returns), 1)
            numbers[f"seed {seed}: evaluation"] = float(rows[-1]["eval_return"])
        checkpoint = next(Path(folder).glob("*/checkpoint.pt"))
        for name, tensor in torch.load(checkpoint, weights_only=True, map_location="cpu")["state"].items():
            if not name.endswith(("avg", "avg_sq")):  # the optimiser's moments: mostly noise
                numbers[f"mean of {name}"] = tensor.double().mean().item()
                numbers[f"norm of {name}"] = tensor.double().norm().item()
    return {name: float(f"{value:.8g}") for name, value in numbers.items()}


def differences(recorded: dict[str, float], now: dict[str, float]) -> list[str]:
    """What no longer agrees within the tolerance, a line each; empty when nothing has changed."""
    lines = [f"{name} is {'new' if name in now else 'gone'}" for name in sorted(recorded.keys() ^ now.keys())]
    for name in recorded.keys() & now.keys():
        was, is_now = recorded[name], now[name]
        if not math.isclose(was, is_now, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            lines.append(f"{name} was {was:.6g}, is {is_now:.6g}")
    return sorted(lines)
