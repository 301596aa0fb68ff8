"""Measure, in one run on this machine: raw EnvPool, our PPO with 1 and 8 seeds, and Stable-Baselines3's PPO.

python benchmarks/speed.py                       # some ten minutes; nothing else should run on the machine
python benchmarks/speed.py --return-goal 3000    # also the seconds until that mean training return, ours and SB3's

Every figure is in environment steps per second, all seeds together. Repeats are interleaved (A B C, A B C, ...), each
in a process of its own with an untimed warm-up; medians with every repeat go to benchmarks/results/speed.json.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, MINIBATCH = 10, 128  # of both; PPO's rollout is 2048 steps per seed in both as well


@dataclass
class Args:
    env_id: str = "Walker2d-v4"  # task
    repeats: int = 3  # of each measurement
    return_goal: float | None = None  # also time how long it takes to train to this mean return
    worker: str | None = None  # internal: the one measurement that this process makes
    output: Path = ROOT / "benchmarks" / "results" / "speed.json"  # where the figures go


def envpool_raw(env_id: str, num_envs: int) -> float:
    """Random actions and nothing else."""
    import envpool
    import numpy as np

    envs = envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=min(num_envs, os.cpu_count()), seed=1)
    envs.reset()
    space = envs.single_action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (16, num_envs, *space.shape))
    steps = 40_000 // num_envs
    for t in range(steps // 4):
        envs.step(actions[t % 16])
    began = time.perf_counter()
    for t in range(steps):
        envs.step(actions[t % 16])
    return steps * num_envs / (time.perf_counter() - began)


def ours(env_id: str, num_seeds: int, update_epochs: int = EPOCHS) -> float:
    """The script, through its command line: median of the reported rate after a fifth of the run as warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "algos/ppo_continuous.py", "--env-id", env_id, "--num-seeds", num_seeds]
        words += ["--total-timesteps", 160_000 // num_seeds + 2048 * 8, "--num-evaluations", 0, "--run-dir", folder]
        words += ["--update-epochs", update_epochs]
        subprocess.run([str(word) for word in words], cwd=ROOT, check=True, capture_output=True)
        path = next(Path(folder).glob("*__1__*/metrics.csv"))
        with open(path, newline="") as file:
            rates = [float(row["steps_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[len(rates) // 5 :])


def sb3(env_id: str, goal: float | None = None) -> float:
    """Stable-Baselines3's PPO, 8 environments, observations and rewards normalised as its zoo does for MuJoCo.

    Without a goal: steps per second over 10 rollouts after one as warm-up. With one: seconds to that mean return of the
    last 100 episodes, or NaN if 1M steps do not reach it."""
    import numpy as np
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    # DummyVecEnv and torch's own number of threads, the defaults: on two cores faster than SubprocVecEnv or one thread
    envs = VecNormalize(make_vec_env(env_id, n_envs=8, seed=1))
    model = PPO("MlpPolicy", envs, n_steps=256, batch_size=MINIBATCH, n_epochs=EPOCHS, device="cpu", seed=1)

    class Goal(BaseCallback):
        def _on_step(self) -> bool:
            episodes = [episode["r"] for episode in self.model.ep_info_buffer]
            return goal is None or len(episodes) < 20 or np.mean(episodes) < goal

    if goal is None:
        model.learn(2048)
        began, steps = time.perf_counter(), 2048 * 10
        model.learn(steps, reset_num_timesteps=False)
        return steps / (time.perf_counter() - began)
    began = time.perf_counter()
    model.learn(1_000_000, callback=Goal())
    return time.perf_counter() - began if model.num_timesteps < 1_000_000 else float("nan")


def seconds_to_goal(env_id: str, num_seeds: int, goal: float) -> float:
    """Training seconds of the script until the mean over its seeds of the training return reaches the goal."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "algos/ppo_continuous.py", "--env-id", env_id, "--num-seeds", str(num_seeds)]
        subprocess.run(
            [*words, "--num-evaluations", "0", "--run-dir", folder], cwd=ROOT, check=True, capture_output=True
        )
        runs = []
        for path in sorted(Path(folder).glob("*/metrics.csv")):
            with open(path, newline="") as file:
                runs.append(list(csv.DictReader(file)))
    for rows in zip(*runs, strict=True):
        if sum(float(row["episodic_return"] or "nan") for row in rows) / len(rows) >= goal:
            return float(rows[0]["wall_seconds"])
    return float("nan")


MEASUREMENTS = {
    "EnvPool alone, 64 environments": lambda env_id: envpool_raw(env_id, 64),
    "EnvPool alone, 512 environments": lambda env_id: envpool_raw(env_id, 512),
    "ppo_continuous, 1 seed": lambda env_id: ours(env_id, 1),
    "ppo_continuous, 1 seed, 2 epochs": lambda env_id: ours(env_id, 1, 2),
    "ppo_continuous, 8 seeds": lambda env_id: ours(env_id, 8),
    "ppo_continuous, 8 seeds, 2 epochs": lambda env_id: ours(env_id, 8, 2),
    "Stable-Baselines3 PPO, 8 environments": sb3,
}


def shares(rate: dict[str, float], seeds: str, num_envs: int) -> dict[str, float]:
    """Where the time of a step goes. An epoch's cost is the slope between 2 and 10 epochs; the simulator's share is
    that of EnvPool alone; what is left is the policy, the values, the copies and the statistics."""
    full, short = 1 / rate[f"ppo_continuous, {seeds}"], 1 / rate[f"ppo_continuous, {seeds}, 2 epochs"]
    update = (full - short) / (EPOCHS - 2) * EPOCHS
    simulator = 1 / rate[f"EnvPool alone, {num_envs} environments"]
    return {"simulator": simulator / full, "update": update / full, "rest": 1 - (simulator + update) / full}


def main(args: Args) -> None:
    if args.worker:
        print(json.dumps(MEASUREMENTS[args.worker](args.env_id)))
        return
    values: dict[str, list[float]] = {name: [] for name in MEASUREMENTS}
    for repeat in range(args.repeats):
        for name in MEASUREMENTS:
            words = [sys.executable, __file__, "--env-id", args.env_id, "--worker", name]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            values[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{repeat + 1}/{args.repeats}  {name:<40}{values[name][-1]:10,.0f} steps/s", flush=True)
    rate = {name: statistics.median(each) for name, each in values.items()}
    peer = rate["Stable-Baselines3 PPO, 8 environments"]
    result = {
        "env_id": args.env_id,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "steps_per_second": {name: {"median": rate[name], "each": each} for name, each in values.items()},
        "times_stable_baselines3": {n: rate[f"ppo_continuous, {n}"] / peer for n in ("1 seed", "8 seeds")},
        "share_of_time": {"1 seed": shares(rate, "1 seed", 64), "8 seeds": shares(rate, "8 seeds", 512)},
    }
    if args.return_goal is not None:
        seconds = {"ppo_continuous, 1 seed": seconds_to_goal(args.env_id, 1, args.return_goal)}
        seconds["Stable-Baselines3 PPO, 1 seed"] = sb3(args.env_id, args.return_goal)
        result["seconds_to_return"] = {"return": args.return_goal, **seconds}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
