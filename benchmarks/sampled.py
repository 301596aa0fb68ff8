"""Evaluate the final agents of a table with sampled actions as well: what most published on-policy means are of.

python benchmarks/run.py --algos a2c --run-dir runs/table --results runs/results
python benchmarks/sampled.py --algos a2c --run-dir runs/table --results runs/results

Takes run.py's arguments, while its run folders are still there. Adds a column to metrics.csv, filled in the last row of
each seed: sampled_return, the mean over 100 episodes from the same starts as the final evaluation's, with actions drawn
from the final policy instead of its mean. report.py compares by it where a published mean is of sampled actions.

The scripts evaluate with the deterministic action only, so this loads them instead of running them.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro
from parts import load
from reading import naming, read_result, read_rows
from run import Args, Job, write_result


def sampled_action(script: ModuleType, agent: Any, obs: torch.Tensor) -> torch.Tensor:
    """What the policy does while it trains, as its `act` has it, ready for the task: [S, B, A]."""
    obs = agent.normalize(obs)
    if hasattr(agent, "policy"):
        return agent.to_task(script.sample(agent.policy(obs)))
    mean = agent.actor(obs)  # PPO
    return agent.to_task(mean + agent.log_std.exp() * torch.randn_like(mean))


def load_agent(script: ModuleType, saved: dict[str, Any]) -> tuple[Any, Any]:
    """The agent that an agent.pt holds, on the CPU, and the arguments that it was trained with."""
    args = script.Args(**saved["args"] | {"device": "cpu", "resume": None})
    envs = script.make_envs(args, [0])
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    agent.load_state_dict(saved["agent"])
    return agent, args


def sampled_return(script: ModuleType, folder: Path) -> float:
    """Mean return of the agent in a run folder."""
    saved = torch.load(folder / "agent.pt", map_location="cpu", weights_only=True)
    agent, args = load_agent(script, saved)
    agent.deterministic_action = lambda obs: sampled_action(script, agent, obs)
    torch.manual_seed(args.seed)
    return float(script.evaluate(agent, args, args.final_eval_episodes, saved["global_step"])["return"].mean())


def main(args: Args) -> int:
    if unfit := [algo for algo in args.algos if algo in ("sac", "ddpg")]:
        print(f"sampled.py: error: {', '.join(unfit)}: for on-policy algorithms only", file=sys.stderr)
        return 2
    args.run_dir = args.run_dir.resolve()  # as run.py does: a run says where it is
    for algo in args.algos:
        script = load(algo)
        for job in (Job(algo, env_id, args, []) for env_id in args.env_ids):
            try:
                seeds, folders = list(read_result(job.result)), job.folders()
                if not folders or seeds != list(range(args.seed, args.seed + args.num_seeds)):
                    raise ValueError(f"{job.runs}: no runs of these seeds, from which this result was gathered")
                rows = read_rows(job.result / "metrics.csv")
                final = {int(row["seed"]): row["eval_return"] for row in rows}  # of the last row
                if [read_rows(folder / "metrics.csv")[-1]["eval_return"] for folder in folders] != list(final.values()):
                    raise ValueError(f"{job.runs}: other runs than those from which this result was gathered")
                with naming(job.runs):
                    finals = {seed: sampled_return(script, folder) for seed, folder in zip(seeds, folders, strict=True)}
            except ValueError as error:
                print(f"sampled.py: error: {error}", file=sys.stderr)
                return 2
            for row, following in zip(rows, [*rows[1:], {"seed": ""}], strict=True):
                last = row["seed"] != following["seed"]
                row["sampled_return"] = f"{finals[int(row['seed'])]:.3f}" if last else ""
            write_result(job.result, rows, json.loads((job.result / "run.json").read_text()))
            print(f"{algo} on {job.env_id}: {' '.join(f'{value:.1f}' for value in finals.values())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
