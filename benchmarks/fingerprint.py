"""The numbers of a short fixed-seed run of a script: they say whether it still computes what its results came from.

A hash of the file would call a result stale when a comment changed; these numbers change when the computation or a
default does. run.py stores them with each result, report.py --check takes them again. A few seconds per script.
"""

import csv
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ENV_ID = "InvertedPendulum-v4"  # small and quick, with bounded actions, so that all scripts take it
# Everything else is a default of the script: a default that changes is a change. One thread: sums in a fixed order.
ARGUMENTS = {"env-id": ENV_ID, "seed": 1, "num-seeds": 2, "device": "cpu", "env-threads": 1, "torch-threads": 1}
ARGUMENTS |= {"num-evaluations": 1, "final-eval-episodes": 4, "checkpoint-seconds": 1e6}
LIMIT = ["--env-kwargs", "max_episode_steps", "5"]  # about where episodes end by falling: both ends of one are seen
STEPS = {"ddpg": 512, "sac": 512}  # half of them before the first update; an update of theirs is dear
ON_POLICY_STEPS = 4096
# Rounding differs between processors and training amplifies it: torch without vector instructions
# (ATEN_CPU_CAPABILITY=default) moved no number by more than 1e-3, absolute or relative.
RELATIVE, ABSOLUTE = 0.01, 1e-3


def fingerprint(script: Path) -> dict[str, float]:
    """Run a script of algos/: its returns, and mean and norm of every tensor that it trains, by name.
    Raises RuntimeError, with the end of its output, if it fails."""
    import torch  # takes seconds, which report.py without --check need not wait for

    arguments = ARGUMENTS | {"total-timesteps": STEPS.get(script.stem, ON_POLICY_STEPS)}
    if script.stem in STEPS:
        arguments["learning-starts"] = STEPS[script.stem] // 2
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(script), "--run-dir", folder, *LIMIT]
        for name, value in arguments.items():
            words += [f"--{name}", str(value)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{script.name} fails on {ENV_ID}:\n{done.stdout[-1000:]}")
        numbers: dict[str, float] = {}
        for path in sorted(Path(folder).glob("*/metrics.csv")):
            seed = path.parent.name.split("__")[-2]
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
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
