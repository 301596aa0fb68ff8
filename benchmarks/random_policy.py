"""The return of uniformly random actions on each task, measured as an agent is: the zero of normalised returns.

python benchmarks/random_policy.py          # some seconds; writes benchmarks/results/random.csv
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import envpool
import numpy as np
import tyro

TASKS = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "Swimmer", "Reacher")
TASKS += ("InvertedPendulum", "InvertedDoublePendulum")  # those of published.csv


@dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(f"{task}-v4" for task in TASKS)  # tasks with bounded actions
    episodes: int = 100  # the first of as many environments
    seed: int = 1  # of the environments and the actions
    output: Path = Path(__file__).resolve().parent / "results" / "random.csv"  # where the numbers go


def random_returns(env_id: str, episodes: int, seed: int) -> np.ndarray:
    """Returns of the first episode of each environment, [episodes]."""
    threads = min(os.cpu_count() or 1, episodes)
    envs = envpool.make(env_id, "gymnasium", num_envs=episodes, num_threads=threads, seed=seed)
    space, generator = envs.action_space, np.random.default_rng(seed)
    envs.reset()
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        _, rewards, terminated, truncated, _ = envs.step(
            generator.uniform(space.low, space.high, (episodes, *space.shape))
        )
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminated | truncated)
    return returns


def main(args: Args) -> None:
    if args.episodes < 2:
        raise SystemExit("random_policy.py: error: a standard deviation takes two episodes")
    with open(args.output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "mean_return", "standard_deviation", "episodes", "seed", "envpool"])
        for env_id in args.env_ids:
            returns = random_returns(env_id, args.episodes, args.seed)
            numbers = [f"{returns.mean():.2f}", f"{returns.std(ddof=1):.2f}"]
            writer.writerow([env_id, *numbers, args.episodes, args.seed, envpool.__version__])
            print(env_id, *numbers, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
