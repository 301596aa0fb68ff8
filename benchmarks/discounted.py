"""What agents maximise beside what the tables show: the discounted return of their episodes beside the return.

python benchmarks/discounted.py runs/Hopper-v4__sac__3__* runs/Hopper-v4__sac__4__*

Takes run folders, of any script, and prints CSV: for each agent the means over the episodes of its last evaluation
(those from other starts than in training, by the deterministic action), discounted from the first step of an episode.
The discount factor is the run's own, unless --gamma names one by which all are measured. SAC's entropy bonus is not
counted, nor is a reward normalised.

At a steady reward a fall after 300 of 1,000 steps costs 70 % of the return, but with a discount factor of 0.99 only
0.99^300 = 5 % of the discounted one: to the algorithm a quicker gait that falls may be worth as much as a safe one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from parts import load
from reading import naming
from sampled import load_agent


@dataclass
class Args:
    agents: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders
    gamma: float | None = None  # discount factor to measure by; without it, that of each run
    episodes: int = 100  # per agent


class Discounting:
    """A pool whose rewards are discounted: those of step t, from 0, by gamma^t."""

    def __init__(self, envs: Any, gamma: float) -> None:
        self.envs, self.gamma, self.factor = envs, gamma, 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envs, name)

    def step(self, actions: Any) -> tuple:
        obs, rewards, *rest = self.envs.step(actions)
        rewards, self.factor = rewards * self.factor, self.factor * self.gamma
        return obs, rewards, *rest


def measure(folder: Path, gamma: float | None, episodes: int) -> str:
    """An agent's line."""
    saved = torch.load(folder / "agent.pt", map_location="cpu", weights_only=True)
    algo = saved["kind"].removesuffix(" agent")
    script = load(algo)
    agent, args = load_agent(script, saved)
    factor = args.gamma if gamma is None else gamma
    means = script.evaluate(agent, args, episodes, saved["global_step"])
    make_envs = script.make_envs
    script.make_envs = lambda *given: Discounting(make_envs(*given), factor)
    discounted = script.evaluate(agent, args, episodes, saved["global_step"])["return"].mean()
    line = [algo, args.env_id, args.seed, saved["global_step"], args.gamma, factor]
    return ",".join(map(str, line)) + f",{means['length'].mean():.1f},{means['return'].mean():.1f},{discounted:.2f}"


def main(args: Args) -> int:
    torch.set_num_threads(1)  # an agent and its batch are small
    print("algo,env_id,seed,global_step,trained_gamma,gamma,length,return,discounted_return")
    for folder in args.agents:
        try:
            with naming(folder):
                print(measure(folder, args.gamma, args.episodes), flush=True)
        except ValueError as error:
            print(f"discounted.py: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
