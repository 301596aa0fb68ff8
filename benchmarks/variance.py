"""The variance of REINFORCE's gradient with each of its estimators, on one fixed policy: the lecture's claim, measured.

python benchmarks/variance.py          # some two minutes

A half-trained policy on CartPole-v1 stands still. Batches of whole episodes are sampled from it, and each estimator
makes a gradient of the same batches: R(tau), reward-to-go, reward-to-go minus a moving average, reward-to-go minus
a learned V(s). The discount of the visitation is kept, so that all four estimate the same gradient; how far their means
lie apart is printed with its standard error. Writes benchmarks/results/variance.json; report.py draws the figure.

A gradient is not in a run's files, so this loads the script instead of running it.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from parts import load
from run import digest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "algos" / "reinforce.py"
ESTIMATORS = {
    "whole return R(tau)": {"baseline": "none", "reward_to_go": False},
    "reward-to-go": {"baseline": "none", "discount_visitation": True},
    "minus a moving average": {"baseline": "mean", "discount_visitation": True},
    "minus a learned V(s)": {"baseline": "value", "discount_visitation": True},
}


@dataclass
class Args:
    train_steps: int = 40_000  # steps of training before the policy stands still
    batches: int = 400  # gradients per estimator
    num_envs: int = 16  # episodes per gradient
    env_id: str = "CartPole-v1"  # task
    run_dir: Path = HERE.parent / "runs" / "variance"  # where the half-trained policy goes
    results: Path = HERE / "results" / "variance.json"  # where the numbers go


def collect(script, agent, envs, num_envs: int, horizon: int) -> dict[str, torch.Tensor]:
    """The first episode of every environment, as `train` collects it: [T, 1, N, ...] with what is behind it masked. The
    time limit is taken for an end, so that V is not asked for what lies behind it."""
    obs, skip, rows = envs.reset()[0], np.zeros(num_envs, bool), []
    for t in range(horizon):
        with torch.no_grad():
            x = torch.as_tensor(obs, dtype=torch.float32)[None]
            actions = script.sample(agent.policy(agent.normalize(x)))
        task_actions = agent.to_task(actions)[0, :, 0].numpy().astype(envs.single_action_space.dtype)
        following, rewards, terminated, truncated, _ = envs.step(task_actions)
        done = (terminated | truncated) & ~skip
        rows.append((x, actions, torch.tensor(rewards), torch.tensor(done), torch.tensor(done),
                     torch.tensor(~skip), torch.full((num_envs,), float(t))))  # fmt: skip
        obs, skip = following, skip | done
        if skip.all():
            break
    names = ("obs", "actions", "rewards", "terminated", "done", "valid", "age")
    rollout = {name: torch.stack([row[i].reshape(1, num_envs, *row[i].shape[1 + (i < 2) :]) for row in rows])
               for i, name in enumerate(names)}  # fmt: skip
    last = torch.as_tensor(obs, dtype=torch.float32)[None, None]
    return rollout | {"obs": torch.cat([rollout["obs"], last])}


def fit_value(script, agent, rollouts: list[dict[str, torch.Tensor]], gamma: float) -> None:
    """Fit V to the returns of other episodes of the same policy, by Adam."""
    optimizer = torch.optim.Adam(agent.critic.parameters(), 3e-3)
    for _ in range(30):
        for rollout in rollouts:
            scaled = rollout["rewards"] * (agent.return_stats.var + 1e-8).rsqrt().squeeze(-1)
            zeros = torch.zeros_like(scaled)
            returns = script.reward_to_go(scaled, zeros, rollout["terminated"], rollout["done"], gamma)
            error = (
                agent.critic(agent.normalize(rollout["obs"][:-1].flatten(0, 2)[None])).reshape(returns.shape) - returns
            )
            optimizer.zero_grad()
            error[rollout["valid"]].square().mean().backward()
            optimizer.step()


def gradient(script, agent, rollout, average, args) -> torch.Tensor:
    """The estimate of the policy gradient from one batch, as one vector; divided by episodes, not by rows."""
    stats = {name: tensor.clone() for name, tensor in agent.return_stats.state_dict().items()}
    batch = script.compute_targets(agent, rollout, torch.zeros(1, args.num_envs), average, args)
    agent.return_stats.load_state_dict(stats)  # no batch leaves a trace in the next one's scale
    log_probs = script.log_prob(batch["actions"], agent.policy(batch["obs"]))
    loss = script.policy_loss(log_probs, batch["weights"], batch["valid"]) * len(rollout["rewards"])
    return -torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(agent.actor.parameters()))])


def main(options: Args) -> None:
    script = load("reinforce")
    words = [sys.executable, str(SCRIPT), "--env-id", options.env_id, "--total-timesteps", str(options.train_steps)]
    folder = options.run_dir / digest(SCRIPT)[:8]  # an edited script trains anew
    words += ["--run-dir", str(folder), "--num-evaluations", "0", "--resume", "auto"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    saved = torch.load(Path(done.stdout.splitlines()[1]) / "agent.pt", weights_only=True)
    torch.manual_seed(1)
    base = saved["args"] | {"num_envs": options.num_envs, "horizon": 500, "num_steps": 500}
    agents, arguments = {}, {}
    for name, changes in ESTIMATORS.items():
        arguments[name] = script.Args(**base | changes)
        envs = script.make_envs(arguments[name], list(range(1, options.num_envs + 1)))
        agents[name] = script.Agent(envs.single_observation_space, envs.single_action_space, arguments[name])
        agents[name].load_state_dict(saved["agent"])
    agent = agents["minus a learned V(s)"]
    apart = [collect(script, agent, envs, options.num_envs, 500) for _ in range(40)]
    fit_value(script, agent, apart, base["gamma"])
    average = torch.zeros(1, 2)
    for rollout in apart:  # the moving average is older than every batch that it is used on
        gradient(script, agents["minus a moving average"], rollout, average, arguments["minus a moving average"])
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ESTIMATORS}
    for _ in range(options.batches):
        rollout = collect(script, agent, envs, options.num_envs, 500)
        for name in ESTIMATORS:
            found[name].append(gradient(script, agents[name], rollout, average, arguments[name]))
    stacked = {name: torch.stack(each) for name, each in found.items()}
    reference = stacked["minus a learned V(s)"].mean(0)
    result = {"env_id": options.env_id, "batches": options.batches, "episodes_per_batch": options.num_envs}
    result |= {"args": {k: v for k, v in base.items() if k not in ("run_dir", "resume", "evaluate")}, "estimators": {}}
    for name, each in stacked.items():
        difference = each - stacked["minus a learned V(s)"]  # of the same batches
        standard_error = (difference.var(0).sum() / len(each)).sqrt().item()
        result["estimators"][name] = {
            "variance": each.var(0).sum().item(),
            "mean_norm": each.mean(0).norm().item(),
            "distance_of_means": (each.mean(0) - reference).norm().item(),
            "standard_error_of_distance": standard_error,
        }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n")
    for name, numbers in result["estimators"].items():
        print(f"{name:<24}" + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))


if __name__ == "__main__":
    main(tyro.cli(Args))
