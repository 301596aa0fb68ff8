"""Measure, in one run on this machine: raw EnvPool, our scripts with 1 and more seeds, and their peers.

python benchmarks/speed.py                                # all algorithms; nothing else should run on the machine
python benchmarks/speed.py --algos ppo_continuous         # one of them, some ten minutes
python benchmarks/speed.py --algos ppo_continuous --return-goal 3000     # and the seconds until that training return
python benchmarks/speed.py --algos sac --cleanrl DIR --leanrl DIR --peer-python PYTHON     # with checkouts of these as
    # well, run by an interpreter that has what they need: gymnasium[mujoco]<1, mujoco<3, stable-baselines3, tyro,
    # tensorboard; LeanRL also tensordict==0.6, torchrl==0.6, wandb, numpy<2.4
python benchmarks/speed.py --device cuda                  # on a GPU: graphs, eager and --compile side by side

Every rate is in environment steps per second, all seeds together. Repeats are interleaved (A B C, A B C, ...), each in
a process of its own with an untimed warm-up; medians with every repeat go to benchmarks/results/speed/<algo>.json, of a
GPU to <algo>_cuda.json. Where the time goes is measured by parts.py, with 1 and with more seeds.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from reading import read_rows

ROOT = Path(__file__).resolve().parent.parent
ON_POLICY = ("ppo_continuous", "trpo", "a2c", "reinforce")
OFF_POLICY = ("sac", "ddpg")
NUM_ENVS = {"ppo_continuous": 64, "trpo": 64, "a2c": 8, "reinforce": 16, "sac": 16, "ddpg": 16}  # by default
MATRIX = "matrix product 256 x 256 x 256, FLOP/s"
SEEDS = {"ppo_continuous": (1, 8)} | dict.fromkeys(("trpo", "a2c", "reinforce"), (1, 5, 8))
SEEDS |= dict.fromkeys(OFF_POLICY, (1, 4, 8))
VARIANTS = {"graphs": [], "eager": ["--no-cuda-graphs"], "compiled": ["--compile"]}


@dataclass
class Args:
    algos: tuple[str, ...] = (*ON_POLICY, *OFF_POLICY)  # scripts of algos/, without .py
    env_id: str = "Walker2d-v4"  # task
    device: str = "cpu"  # cpu or cuda, of our scripts
    variants: tuple[Literal["graphs", "eager", "compiled"], ...] = ("graphs", "eager", "compiled")  # of them, on CUDA
    repeats: int = 3  # of each measurement
    peers: bool = True  # measure Stable-Baselines3 and sb3-contrib as well
    return_goal: float | None = None  # also time how long it takes to train to this mean return, ours and SB3's
    cleanrl: Path | None = None  # a checkout of CleanRL, of whose PPO, SAC and DDPG the rate is measured too
    leanrl: Path | None = None  # a checkout of LeanRL, of whose PPO and SAC the rate is measured too
    peer_python: Path = Path(sys.executable)  # an interpreter with the packages that these need
    output: Path = ROOT / "benchmarks" / "results" / "speed"  # where the figures go
    worker: str | None = None  # internal: the one measurement that this process makes


def seeds_text(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds > 1)}"


def end_with_parent() -> None:
    """In a child, before it begins: when its parent ends, by a time limit say, so does it. Nothing must run on beside
    the next measurement. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_quietly(words: list[str], **how: Any) -> str:
    """Run a command; return what it showed on its standard error. Where it fails, show the end of that and stop."""
    how |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(words, preexec_fn=end_with_parent, **how)
    if done.returncode:
        raise SystemExit("\n".join([f"{' '.join(words[:2])}: exit status {done.returncode}", done.stderr[-2000:]]))
    return done.stderr


def envpool_raw(env_id: str, num_envs: int) -> float:
    """Random actions and nothing else."""
    import envpool
    import numpy as np

    envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=min(num_envs, os.cpu_count()), seed=1)
    envs.reset()
    space = envs.single_action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (16, num_envs, *space.shape))
    steps = 60_000 // num_envs
    for t in range(steps // 4):
        envs.step(actions[t % 16])
    began = time.perf_counter()
    for t in range(steps):
        envs.step(actions[t % 16])
    return steps * num_envs / (time.perf_counter() - began)


def matrix_rate(size: int = 256) -> float:
    """Floating-point operations per second of a float32 product size x size x size, on one thread per core."""
    import torch

    a, b, out = (torch.randn(size, size) for _ in range(3))
    count = 3000
    for timed in (False, True):
        began = time.perf_counter()
        for _ in range(count if timed else count // 4):
            torch.mm(a, b, out=out)
    return 2 * size**3 * count / (time.perf_counter() - began)


def ours(algo: str, env_id: str, device: str, num_seeds: int, *flags: str) -> float:
    """The script, through its command line: its mean rate after a fifth of the run as warm-up; for the off-policy ones,
    after learning has started."""
    arguments = {"env-id": env_id, "device": device, "num-seeds": num_seeds, "num-evaluations": 0}
    arguments["checkpoint-seconds"] = 1e6
    if algo in ON_POLICY:
        arguments["total-timesteps"] = 120_000 // num_seeds + 4096 * 4
    else:
        arguments |= {"total-timesteps": 4000 + 8000 // num_seeds, "learning-starts": 4000}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, f"algos/{algo}.py", "--run-dir", folder, *flags]
        for name, value in arguments.items():
            words += [f"--{name}", str(value)]
        run_quietly(words, cwd=ROOT)
        path = next(Path(folder).glob("*__1__*/metrics.csv"))
        rows = read_rows(path)
    if algo in OFF_POLICY:
        rows = [row for row in rows if int(row["global_step"]) > 4000]
    first, last = ((int(row["global_step"]), float(row["wall_seconds"])) for row in (rows[len(rows) // 5], rows[-1]))
    return num_seeds * (last[0] - first[0]) / (last[1] - first[1])


def apart(algo: str, env_id: str) -> float:
    """What several seeds in one process have to beat: a process per core side by side, of one seed and one thread each.
    The sum of their rates."""
    flags = ("--env-threads", "1", "--torch-threads", "1")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(ours, algo, env_id, "cpu", 1, *flags) for _ in range(os.cpu_count())]
        return sum(run.result() for run in runs)


def sb3(algo: str, env_id: str, goal: float | None = None, **extra: Any) -> float:
    """Stable-Baselines3's implementation (sb3-contrib's of TRPO) with its default arguments, unless `extra` says
    otherwise: on-policy with 8 environments, observations and rewards normalised as its zoo does for MuJoCo.

    Without a goal: steps per second after a warm-up. With one: seconds to that mean return of the last 100 episodes, or
    NaN if 1M steps do not reach it."""
    import numpy as np
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    name = {"ppo_continuous": "PPO"}.get(algo, algo.upper())
    implementation = getattr(sb3_contrib if algo == "trpo" else stable_baselines3, name)
    if algo in OFF_POLICY:  # one environment and one update per step, its defaults
        model = implementation("MlpPolicy", env_id, learning_starts=500, device="cpu", seed=1, **extra)
        warm_up, steps = 1000, 2000
    else:
        # DummyVecEnv and torch's own number of threads: the defaults, and the fastest on two cores
        envs = VecNormalize(make_vec_env(env_id, n_envs=8, seed=1))
        if algo in ("ppo_continuous", "trpo"):
            extra = {"n_steps": 256} | extra  # a rollout of 2048 steps, as ours
        model = implementation("MlpPolicy", envs, device="cpu", seed=1, **extra)
        warm_up, steps = 2048, 2048 * 10

    class Goal(BaseCallback):
        def _on_step(self) -> bool:
            episodes = [episode["r"] for episode in self.model.ep_info_buffer]
            return goal is None or len(episodes) < 20 or np.mean(episodes) < goal

    if goal is None:
        model.learn(warm_up)
        began = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        return steps / (time.perf_counter() - began)
    began = time.perf_counter()
    model.learn(1_000_000, callback=Goal())
    return time.perf_counter() - began if model.num_timesteps < 1_000_000 else float("nan")


CLEANRL = {name: f"{name}_continuous_action" for name in ("sac", "ddpg")} | {"ppo_continuous": "ppo_continuous_action"}
LEANRL = {"sac": "sac_continuous_action_torchcompile", "ppo_continuous": "ppo_continuous_action_torchcompile"}


def cleanrl(algo: str, env_id: str, device: str, checkout: Path, python: Path, *flags: str) -> float:
    """CleanRL's script after learning has started, by the rate between two points of its own clock."""
    words = [str(python.absolute()), str(checkout.resolve() / "cleanrl" / f"{CLEANRL[algo]}.py"), "--env-id", env_id]
    words += ["--no-cuda"] if device == "cpu" else []
    off_policy = algo in OFF_POLICY
    words += ["--total-timesteps", "3000", "--learning-starts", "500"] if off_policy else ["--total-timesteps", "12288"]
    words += flags
    with tempfile.TemporaryDirectory() as folder:
        paths = os.environ | {"PYTHONPATH": str(checkout.resolve())}  # of its cleanrl_utils
        run_quietly(words, cwd=folder, env=paths)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
        points = [point for point in events.Scalars("charts/SPS") if point.step > 1000]
    first, last = points[0], points[-1]
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def leanrl(algo: str, env_id: str, device: str, checkout: Path, python: Path) -> float:
    """LeanRL's script, by the last rate that its progress bar shows: a mean after a warm-up of its own. Compiled and
    with CUDA graphs on a GPU; eager, its default, on a CPU, where compiling takes minutes."""
    words = [str(python.absolute()), str(checkout.resolve() / "leanrl" / f"{LEANRL[algo]}.py"), "--env-id", env_id]
    words += ["--no-cuda"] if device == "cpu" else ["--compile", "--cudagraphs"]
    steps = {"sac": 3000 if device == "cpu" else 20_000, "ppo_continuous": 2048 * (12 if device == "cpu" else 42)}
    words += ["--total-timesteps", str(steps[algo])] + (["--learning-starts", "500"] if algo == "sac" else [])
    with tempfile.TemporaryDirectory() as folder:
        quiet = os.environ | {"WANDB_MODE": "disabled"}
        shown = run_quietly(words, cwd=folder, env=quiet)
    return float(re.findall(r"([\d.]+) sps", shown)[-1])


def seconds_to_goal(algo: str, env_id: str, device: str, num_seeds: int, goal: float) -> float:
    """Training seconds of the script until the mean over its seeds of the training return reaches the goal."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, f"algos/{algo}.py", "--env-id", env_id, "--num-seeds", str(num_seeds)]
        words += ["--num-evaluations", "0", "--run-dir", folder, "--device", device]
        run_quietly(words, cwd=ROOT)
        runs = [read_rows(path) for path in sorted(Path(folder).glob("*/metrics.csv"))]
    for rows in zip(*runs, strict=True):
        if sum(float(row["episodic_return"] or "nan") for row in rows) / len(rows) >= goal:
            return float(rows[0]["wall_seconds"])
    return float("nan")


def update_flop(algo: str, obs: int, actions: int, rows: int = 256, hidden: int = 256) -> int:
    """Floating-point operations in the matrix products of one update of SAC or DDPG, by default sizes."""
    actor_first, critic_first = obs * hidden, (obs + actions) * hidden
    actor = actor_first + hidden * hidden + hidden * actions * (2 if algo == "sac" else 1)
    critic = critic_first + hidden * hidden + hidden
    # Forward, gradients of weights, gradients of inputs: the actor for the target's action, and once with gradients;
    # a critic as target, once with gradients, and once for the actor, down to the action but without its own weights.
    actor_products = 4 * actor - actor_first
    critic_products = 6 * critic - critic_first
    return 2 * rows * (actor_products + critic_products * (2 if algo == "sac" else 1))


def numbers_of_seeds(algo: str, args: Args) -> tuple[int, ...]:
    return SEEDS[algo] if args.device == "cpu" else (1, 8)


def measurements(algo: str, args: Args) -> dict[str, Callable[[], float]]:
    """What is measured for an algorithm, by the name under which the table shows it."""
    plans: dict[str, Callable[[], float]] = {}
    variants = args.variants if args.device != "cpu" else ("graphs",)
    for seeds in numbers_of_seeds(algo, args):
        envs = NUM_ENVS[algo] * seeds
        plans[f"EnvPool alone, {envs} environments"] = functools.partial(envpool_raw, args.env_id, envs)
    for variant, seeds in itertools.product(variants, numbers_of_seeds(algo, args)):  # compilations, the slowest, last
        name = f"{algo}, {seeds_text(seeds)}" + f", {variant}" * (variant != "graphs")
        plans[name] = functools.partial(ours, algo, args.env_id, args.device, seeds, *VARIANTS[variant])
    if args.device == "cpu":
        plans[f"{algo}, a process per core"] = functools.partial(apart, algo, args.env_id)
    if algo == "ppo_continuous" and args.device != "cpu":
        plans["EnvPool alone, 1 environment"] = functools.partial(envpool_raw, args.env_id, 1)
        flags = ["--num-envs", "1", "--num-steps", "2048", "--num-minibatches", "32"]
        plans[f"{algo}, 1 environment"] = functools.partial(ours, algo, args.env_id, args.device, 1, *flags)
    peer = "sb3-contrib" if algo == "trpo" else "Stable-Baselines3"
    if args.peers and algo != "reinforce":  # which Stable-Baselines3 does not have
        plans[f"{peer}, its defaults"] = functools.partial(sb3, algo, args.env_id)
        if algo == "ppo_continuous":
            plans[f"{peer}, our minibatch size"] = functools.partial(sb3, algo, args.env_id, batch_size=128)
        elif algo == "a2c":
            plans[f"{peer}, our rollout length"] = functools.partial(sb3, algo, args.env_id, n_steps=64)
        elif algo == "trpo":
            ours_too = {"batch_size": 256, "n_critic_updates": 5, "cg_max_steps": 10}
            plans[f"{peer}, our number of steps"] = functools.partial(sb3, algo, args.env_id, **ours_too)
        elif algo == "ddpg":
            ours_too = {"policy_kwargs": {"net_arch": [256, 256]}}
            plans[f"{peer}, our networks"] = functools.partial(sb3, algo, args.env_id, **ours_too)
    if algo in OFF_POLICY and args.device == "cpu":
        plans[MATRIX] = matrix_rate
    peer = (algo, args.env_id, args.device)
    if args.cleanrl and algo in CLEANRL:
        plans["CleanRL, its defaults"] = functools.partial(cleanrl, *peer, args.cleanrl, args.peer_python)
        if algo == "ddpg":  # whose actor and targets stand still on every second step by default
            flags = ("--policy-frequency", "1")
            plans["CleanRL, our updates"] = functools.partial(cleanrl, *peer, args.cleanrl, args.peer_python, *flags)
    if args.leanrl and algo in LEANRL:
        name = "LeanRL, its defaults" if args.device == "cpu" else "LeanRL, compiled, CUDA graphs"
        plans[name] = functools.partial(leanrl, *peer, args.leanrl, args.peer_python)
    return plans


def processor() -> str | None:
    """The CPU as Linux names it, with its family and model, since a cloud may hide the name; None on other systems."""
    info = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    numbers = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    return ", ".join([facts["model name"], *numbers]) if "model name" in facts else None


def versions(args: Args) -> dict[str, str]:
    """Of what was measured: packages, and the commits of checkouts."""
    import torch

    found = {"torch": torch.__version__}  # and its build (+cpu, +cu130), which PyPI's metadata leaves out
    for name in ("envpool", "gymnasium", "stable-baselines3", "sb3-contrib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for name, checkout in (("this repository", ROOT), ("CleanRL", args.cleanrl), ("LeanRL", args.leanrl)):
        words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
            if checkout:
                found[name] = subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True).strip()
    return found


def summary(algo: str, args: Args, values: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and what follows from them."""
    rate = {name: statistics.median(each) for name, each in values.items()}
    flops = rate.pop(MATRIX, None)
    own = {seeds: f"{algo}, {seeds_text(seeds)}" for seeds in numbers_of_seeds(algo, args)}
    peers = [name for name in rate if not name.startswith((algo, "EnvPool"))]
    gpu = None
    if args.device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name()
    result = {
        "algo": algo,
        "env_id": args.env_id,
        "hardware": {"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": versions(args),
        "steps_per_second": {name: {"median": rate[name], "each": values[name]} for name in rate},
        "of_envpool": {
            seeds_text(n): rate[own[n]] / rate[f"EnvPool alone, {NUM_ENVS[algo] * n} environments"] for n in own
        },
        "times_peer": {name: {seeds_text(n): rate[own[n]] / rate[name] for n in own} for name in peers},
    }
    if flops is not None:
        result["matrix_product_flops"] = flops
        import envpool

        spec = envpool.make_spec(args.env_id)
        flop = update_flop(algo, spec.observation_space.shape[0], spec.action_space.shape[0])
        result["of_matrix_product"] = {seeds_text(n): rate[own[n]] * flop / flops for n in own}
    return result


def keep(result: dict[str, Any], args: Args) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    name = result["algo"] if args.device == "cpu" else f"{result['algo']}_cuda"
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def main(args: Args) -> None:
    if args.worker:
        (algo,) = args.algos
        print(json.dumps(measurements(algo, args)[args.worker]()))
        return
    if unknown := set(args.algos) - {*ON_POLICY, *OFF_POLICY}:
        raise SystemExit(f"speed.py: error: there is no {', '.join(unknown)}")
    if missing := [folder for folder in (args.cleanrl, args.leanrl) if folder and not folder.is_dir()]:
        raise SystemExit(f"speed.py: error: {missing[0]} is no checkout")
    if args.repeats < 1:
        raise SystemExit("speed.py: error: repeats is at least 1")
    failed = []
    for algo in args.algos:
        values: dict[str, list[float]] = {name: [] for name in measurements(algo, args)}
        counts = numbers_of_seeds(algo, args)
        needed = {f"{algo}, {seeds_text(n)}" for n in counts}
        needed |= {f"EnvPool alone, {NUM_ENVS[algo] * n} environments" for n in counts}
        for repeat in range(args.repeats):
            for name in list(values):
                words = [sys.executable, __file__, "--env-id", args.env_id, "--algos", algo, "--worker", name]
                words += ["--device", args.device, "--peer-python", str(args.peer_python), "--variants", *args.variants]
                for flag, checkout in (("--cleanrl", args.cleanrl), ("--leanrl", args.leanrl)):
                    words += [flag, str(checkout)] if checkout else []
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
                if done.returncode:
                    print(f"{algo}: {name} failed and is left out", flush=True)
                    failed += [f"{algo}: {name}"] * (name not in needed)  # else the whole algorithm is
                    del values[name]
                    continue
                values[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{algo} {repeat + 1}/{args.repeats}  {name:<42}{values[name][-1]:18,.0f}", flush=True)
                so_far = {name: each for name, each in values.items() if each}
                if args.device != "cpu" and needed <= so_far.keys():
                    keep(summary(algo, args, so_far), args)  # gpu.sh's time may be up before all is measured
        if not needed <= values.keys():
            failed.append(algo)
            continue
        result = summary(algo, args, values)
        result["parts"] = {}
        keep(result, args)  # what follows may fail, or be cut off
        for seeds in numbers_of_seeds(algo, args):
            words = [sys.executable, str(Path(__file__).with_name("parts.py")), "--algo", algo]
            words += ["--env-id", args.env_id, "--device", args.device, "--num-seeds", str(seeds)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
            if done.returncode:
                failed.append(f"parts of {algo} with {seeds_text(seeds)}")
                continue
            result["parts"][seeds_text(seeds)] = json.loads(done.stdout[done.stdout.index("{") :])
            keep(result, args)
        if args.return_goal is not None:
            seconds = {f"{algo}, 1 seed": seconds_to_goal(algo, args.env_id, args.device, 1, args.return_goal)}
            if args.peers and algo != "reinforce":
                seconds["Stable-Baselines3"] = sb3(algo, args.env_id, args.return_goal)
            result["seconds_to_return"] = {"return": args.return_goal, **seconds}
            keep(result, args)
        print(json.dumps(result, indent=2))
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
