"""Where the time of training goes: each part of a script's loop, timed in a short real run.

python benchmarks/parts.py --algo sac                        # policy, update and simulator, milliseconds per call
python benchmarks/parts.py --algo sac --device cuda --num-seeds 8            # replays of graphs, and their kernels

What a script hands to `capture` (on CUDA the recorded graphs) and the steps of its simulator are wrapped in a clock.
On CUDA the clock waits for the device before and after, so that parts which overlap in training add up to more than it
takes. Loads the script, since parts are not in a run's files.
"""

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

ALGOS = Path(__file__).resolve().parent.parent / "algos"


@dataclass
class Args:
    algo: Literal["ppo_continuous", "trpo", "a2c", "reinforce", "sac", "ddpg"] = "ppo_continuous"  # script of algos/
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
    """Kernels and copies that one call launches on the CUDA device; of two calls the second, as a session of the
    profiler may miss its first kernels (pytorch/pytorch issue 192021)."""
    torch.cuda.synchronize()
    once_more = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], schedule=once_more) as profile:
        replay()
        torch.cuda.synchronize()
        profile.step()
        replay()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(args: Args) -> dict[str, dict[str, float]]:
    """By part: `calls`, `milliseconds` per call, `share` of the training time and, on CUDA, `kernels` per call; the
    part "training" is the whole, off-policy from the first update on; its calls are environment steps of all seeds."""
    if args.num_seeds < 1:
        raise SystemExit("parts.py: error: num-seeds is at least 1")
    script = load(args.algo)
    off_policy = args.algo in ("sac", "ddpg")
    steps = args.total_timesteps or (1600 + 1600 // args.num_seeds if off_policy else 8192 + 32_768 // args.num_seeds)
    spans: list[tuple[str, float, float]] = []  # part, begin and end of each call
    graphs: dict[str, tuple[Callable, Callable]] = {}  # what was recorded, which holds its tensors, and its replay
    on_cuda = args.device.startswith("cuda")

    def timed(name: str, function: Callable) -> Callable:
        def call(*inputs: Any) -> Any:
            if on_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            output = function(*inputs)
            if on_cuda:
                torch.cuda.synchronize()
            spans.append((name, began, time.perf_counter()))
            return output

        return call

    capture, make_envs = script.capture, script.make_envs

    def timed_capture(function: Callable[[], None], *rest: Any) -> Callable:
        replay = capture(function, *rest)
        graphs[function.__name__] = function, replay
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
        training = script.Args(**values, run_dir=folder)
        script.train(training)
    # Off-policy, what comes before the first update is not what training is like
    start = next(i for i, (name, _, _) in enumerate(spans) if name == "learn" or not off_policy)
    spans = spans[start:]
    whole = spans[-1][2] - spans[0][1]
    steps = sum(name == "simulator" for name, _, _ in spans) * training.num_envs * args.num_seeds
    found = {}
    for part in dict.fromkeys(name for name, _, _ in spans):
        seconds = [end - begin for name, begin, end in spans if name == part]
        found[part] = {"calls": len(seconds), "milliseconds": 1e3 * sum(seconds) / len(seconds)}
        found[part]["share"] = sum(seconds) / whole
        # Last, as the profiler slows what follows
        if on_cuda and part in graphs and (kernels := count_kernels(graphs[part][1])):
            found[part]["kernels"] = kernels
    return found | {"training": {"calls": steps, "milliseconds": 1e3 * whole / steps, "share": 1.0}}


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Args)), indent=2))
