"""Where the time of training goes: each part of a script's loop, timed in a short real run.

python benchmarks/parts.py --algo sac                        # policy, update and simulator, milliseconds per call
python benchmarks/parts.py --algo sac --device cuda --num-seeds 8            # replays of graphs, and their kernels

What a script hands to `capture` (on CUDA the recorded graphs) and the steps of its simulator are wrapped in a clock.
On CUDA the clock waits for the device before and after, so that parts which overlap in training add up to more than it
takes. Loads the script, since parts are not in a run's files.
"""

import collections
import csv
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

ALGOS = Path(__file__).resolve().parent.parent / "algos"


@dataclass
class Args:
    algo: str = "ppo_continuous"  # script of algos/, without .py
    env_id: str = "Walker2d-v4"  # task
    num_seeds: int = 1  # agents side by side
    device: str = "cpu"  # cpu or cuda
    total_timesteps: int | None = None  # steps per seed; without it, enough for some seconds


def load(algo: str) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(algo, ALGOS / f"{algo}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[algo] = module
    spec.loader.exec_module(module)
    return module


def count_kernels(replay: Callable[[], None]) -> int:
    """Kernels and copies that one call launches on the CUDA device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(args: Args) -> dict[str, dict[str, float]]:
    """By part: `calls`, `milliseconds` per call, `share` of the training time and, on CUDA, `kernels` per call; the
    part "training" is the whole, whose calls are environment steps of all seeds."""
    script = load(args.algo)
    off_policy = args.algo in ("sac", "ddpg")
    steps = args.total_timesteps or (1600 + 1600 // args.num_seeds if off_policy else 8192 + 32_768 // args.num_seeds)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    kernels: dict[str, int] = {}
    on_cuda = args.device.startswith("cuda")

    def timed(name: str, function: Callable) -> Callable:
        def call(*inputs: Any) -> Any:
            if on_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            output = function(*inputs)
            if on_cuda:
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - began
            calls[name] += 1
            return output

        return call

    capture, make_envs = script.capture, script.make_envs

    def timed_capture(function: Callable[[], None], *rest: Any) -> Callable:
        replay = capture(function, *rest)
        if on_cuda:
            kernels[function.__name__] = count_kernels(replay)
        return timed(function.__name__, replay)

    def timed_envs(*inputs: Any) -> Any:
        envs = make_envs(*inputs)
        envs.step = timed("simulator", envs.step)
        return envs

    script.capture, script.make_envs = timed_capture, timed_envs
    values: dict[str, Any] = {"env_id": args.env_id, "num_seeds": args.num_seeds, "device": args.device}
    values |= {"total_timesteps": steps, "num_evaluations": 0, "checkpoint_seconds": 1e6}
    values |= {"learning_starts": 1600, "buffer_size": 100_000} if off_policy else {}
    with tempfile.TemporaryDirectory() as folder:
        runs = script.train(script.Args(**values, run_dir=folder))
        with open(runs[0] / "metrics.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
    seconds["training"], calls["training"] = float(last["wall_seconds"]), int(last["global_step"]) * args.num_seeds
    found = {}
    for name in seconds:
        share = seconds[name] / seconds["training"]
        found[name] = {"calls": calls[name], "milliseconds": 1e3 * seconds[name] / calls[name], "share": share}
        if name in kernels:
            found[name]["kernels"] = kernels[name]
    return found


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Args)), indent=2))
