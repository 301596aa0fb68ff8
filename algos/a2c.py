# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "envpool==1.2.5", "gymnasium==1.4.0", "tyro", "tensorboard", "tqdm", "imageio[ffmpeg]"]
# ///
"""Advantage actor-critic, A2C: the synchronous form of A3C (Mnih et al., 2016, arXiv:1602.01783).

The idea: play a few steps in many environments at once, ask a learned value function how much better than expected they
went, and take one gradient step that makes better-than-expected actions more likely. Each batch is used once.

    J = E[ sum_t gamma^t r_t ]                                               objective
    grad J = E[ sum_t gamma^t grad log pi(a_t|s_t) A_t ]                     policy gradient theorem, A = Q - V
           = E_{s, a ~ d}[ grad log pi(a|s) A ] / (1 - gamma)                d(s) = (1 - gamma) sum_t gamma^t P(s_t = s)
    A_t ~ sum_l (gamma * lambda)^l delta_{t+l}, held constant                its estimate: GAE, compute_gae
        = r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) - V(s_t)            --gae-lambda 1: the n-step advantage
    delta_t = r_t + gamma * (1 - terminated_t) * V(s_{t+1}) - V(s_t)         --gae-lambda 0: the TD error
    returns = A + V, held constant                                           the target of V
    loss = -E[ log pi A ] + vf_coef * E[ (V - returns)^2 ] / 2 - ent_coef * E[ entropy ]                      update
           + bounds_loss_coef * E[ |mean - clip(mean)|^2 ]                   detail 7

    python algos/a2c.py --env-id CartPole-v1                                               # discrete actions
    python algos/a2c.py --env-id Walker2d-v4 --num-seeds 5                                 # continuous ones
    python algos/a2c.py --env-id Walker2d-v4 --gae-lambda 0 --num-steps 1                  # TD actor-critic

lambda = 0 has the least variance and all the bias of V's error, lambda = 1 the least bias and the variance of n sampled
rewards; n reaches to the end of the rollout or episode. A3C plays the environments in asynchronous workers, whose
gradients arrive late; here they step together and one batch holds them all. Games played side by side decorrelate a
batch, as a replay would. The theorem weights step t by gamma^t, or draws states from d: play on with probability
gamma, else stop, and take the state where it stopped. Practice drops the weight, as this script does, and what is then
followed is in general the gradient of no objective (Nota and Thomas, 2020, arXiv:1906.07073).

Details that matter:
 1. Seed axis: every tensor of a network is [S, ...] and one batched product trains S independent agents. Losses are
    summed over seeds; norms and statistics are per seed, so no seed affects another. Shapes: S seeds, N environments of
    each, T steps, B rows (T * N), D and (in shapes only) A dimensions of observation and action.
 2. Next-step auto-reset: the step after `done` ignores its action and returns the first observation of the new
    episode. That row, the reset row, is not a transition: `valid` masks it out of every loss and statistic.
 3. obs[t + 1] is the true next observation of every valid row, including an episode's last. So truncation
    bootstraps from V(obs[t + 1]); termination does not; the sum over l ends at both.
 4. A policy is a softmax over actions or a normal, depending on the action space; the algorithm is the same.
 5. Observations are centred and divided by their running standard deviation, whose statistics take in a batch only
    after its update. Rewards are not centred, but divided by the running standard deviation of `discounted_sums`, this
    batch included. Both are clipped to +-10. Evaluation freezes the statistics and reports the task's own return.
 6. The unit of a normal policy is half the action range. Actions are scaled and clipped to the task's bounds for the
    simulator only; the log-probability is that of the unclipped action. The policy's standard deviation sigma has a
    floor: the gradient of the mean grows like 1 / sigma, and when advantages are only noise, that ruins a perfect
    policy.
 7. Far outside the action range all samples of a normal policy are clipped to the same action: nothing is explored any
    more, and the gradient is noise. `bounds_loss` keeps the mean from going there (that of rl_games begins at 1.1
    times the range).
Deviations from the paper: 5, 6, 7, orthogonal initialisation, other networks and no recurrence, a sigma that does not
depend on the state, a value loss of weight vf_coef / 2, a clipped gradient norm, no entropy bonus, GAE, Adam and, on
MuJoCo, bootstrapping (the paper updates once an episode there, without). Closer to its Atari runs is
`--gae-lambda 1 --num-steps 5 --optimizer rmsprop --ent-coef 0.01 --bounds-loss-coef 0`, though PyTorch's RMSprop
divides by sqrt(g) + epsilon, the paper's by sqrt(g + epsilon), g being the running mean of squared gradients.
"""

import contextlib
import ctypes
import difflib
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

try:  # EnvPool films without a screen if this library is loaded first, and ends the process if it is not there
    HAS_EGL = bool(ctypes.CDLL("libEGL.so.1", ctypes.RTLD_GLOBAL))
except OSError:
    HAS_EGL = False

import envpool
import gymnasium
import imageio
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

warnings.filterwarnings("ignore", message=".*precision lowered by casting", module="gymnasium")
warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")


@dataclass
class Args:
    # Experiment
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of the first agent; the next ones have seed + 1, seed + 2, ...
    num_seeds: int = 1  # agents trained side by side, independent of each other
    total_timesteps: int = 1_000_000  # environment steps per seed, reset rows included
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes CUDA where there is one
    resume: str | None = None  # folder (of the first seed) to resume, or auto: the newest of the same command
    evaluate: str | None = None  # run folder (or agent.pt) whose agent to evaluate, without training

    # Environment
    env_id: str = "Walker2d-v4"  # task, as EnvPool names it
    env_kwargs: dict[str, str] = field(default_factory=dict)  # settings of the task, all at once: NAME VALUE ...
    num_envs: int = 8  # environments per seed

    # Algorithm
    num_steps: int = 64  # steps of each environment per iteration (the largest n of the n-step advantage)
    learning_rate: float = 3e-3  # initial learning rate
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop is nearly that of the paper
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.98  # of generalised advantage estimation: 0 is the TD error, 1 the n-step advantage
    norm_adv: bool = False  # normalise advantages
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    bounds_loss_coef: float = 0.01  # weight of the squared distance of a normal policy's mean from the action range
    max_grad_norm: float = 0.5  # norm to which each seed's gradient is clipped
    hidden_size: int = 64  # units in each of the two hidden layers; 0 is none: linear
    log_std_init: float = -0.5  # logarithm of the initial standard deviation, in units of half the action range
    log_std_min: float = -1.5  # floor of that logarithm

    # Speed
    env_threads: int = 0  # threads of EnvPool; 0 is one per core
    torch_threads: int = 1  # threads of torch on a CPU; 0 is one per core; more than there are free cores slow it down
    cuda_graphs: bool = True  # on CUDA, replay recorded graphs instead of launching kernel by kernel
    compile: bool = False  # torch.compile the gradient step, for CUDA (a CPU gains nothing): a minute more at the start

    # Output
    run_dir: str = "runs"  # parent folder of the run folders
    num_evaluations: int = 10  # evaluations over the run, the last one at its end; 0 is none
    eval_episodes: int = 10  # episodes per seed in each evaluation but the last
    final_eval_episodes: int = 100  # episodes per seed in the last evaluation, and with --evaluate
    checkpoint_seconds: float = 60.0  # time between two checkpoints
    capture_video: Literal["gif", "mp4"] | None = None  # film an episode of each seed's agent at the end

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def batch_size(self) -> int:
        """Rows per seed and iteration."""
        return self.num_envs * self.num_steps

    @property
    def trained_timesteps(self) -> int:
        """A last partial rollout is not run."""
        return self.total_timesteps // self.batch_size * self.batch_size


# ------------------------------------------------------------------------------------------------------------- Networks


class Linear(nn.Module):
    """S linear layers side by side: y[s] = x[s] @ weight[s] + bias[s], for x [S, B, in] and y [S, B, out]."""

    def __init__(self, in_features: int, out_features: int, gain: float, generators: list[torch.Generator]) -> None:
        super().__init__()
        weights = [nn.init.orthogonal_(torch.empty(out_features, in_features), gain, generator=g).T for g in generators]
        self.weight = nn.Parameter(torch.stack(weights))
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(sizes: list[int], activation: Callable, last_gain: float, generators: list[torch.Generator]) -> nn.Sequential:
    """Layers of these sizes, the last one linear, for all seeds; hidden layers of size 0 are left out."""
    sizes = [size for size in sizes if size]
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(sizes[:-1]):
        layers += [Linear(in_features, out_features, 2**0.5, generators), activation()]
    return nn.Sequential(*layers, Linear(sizes[-2], sizes[-1], last_gain, generators))


class Agent(nn.Module):
    """Actor, critic and statistics of S seeds. Every tensor of `state_dict()` starts with the seed axis, so `[k:k+1]`
    of each is the agent of seed k alone, and the initial weights of a seed do not depend on the other seeds."""

    def __init__(self, obs_space: gymnasium.spaces.Box, action_space: gymnasium.Space, args: Args) -> None:
        super().__init__()
        S = args.num_seeds
        self.obs_dim, self.action_dim = int(np.prod(obs_space.shape)), int(np.prod(action_space.shape))
        self.discrete = isinstance(action_space, gymnasium.spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else self.action_dim
        generators = [torch.Generator().manual_seed(args.seed + k) for k in range(S)]
        self.actor = mlp([self.obs_dim, args.hidden_size, args.hidden_size, outputs], nn.Tanh, 0.01, generators)
        self.critic = mlp([self.obs_dim, args.hidden_size, args.hidden_size, 1], nn.Tanh, 1.0, generators)
        self.obs_stats = RunningMeanStd(S, self.obs_dim)
        self.return_stats = RunningMeanStd(S, 1)  # of discounted_sums
        if self.discrete:
            self.first_action = int(action_space.start)
            return
        self.log_std = nn.Parameter(torch.full((S, 1, self.action_dim), args.log_std_init))
        low, high = torch.tensor(action_space.low).float().ravel(), torch.tensor(action_space.high).float().ravel()
        bounded = (low < high) & (high - low).isfinite()  # else the policy's unit is the task's own
        self.action_low, self.action_high = nn.Buffer(low, persistent=False), nn.Buffer(high, persistent=False)
        self.action_scale = nn.Buffer(torch.where(bounded, (high - low) / 2, 1.0), persistent=False)
        self.action_bias = nn.Buffer(torch.where(bounded, (high + low) / 2, 0.0), persistent=False)

    def normalize(self, obs: Tensor) -> Tensor:
        return ((obs - self.obs_stats.mean) * (self.obs_stats.var + 1e-8).rsqrt()).clamp(-10, 10)

    def policy(self, obs: Tensor) -> tuple[Tensor, ...]:
        """(logits [S, B, n],) of a softmax, or (mean [S, B, A], log_std [S, 1, A]) of a normal, for normalised obs."""
        outputs = self.actor(obs)
        return (outputs,) if self.discrete else (outputs, self.log_std)

    def to_task(self, actions: Tensor) -> Tensor:
        """Actions of the policy [S, B, A] as the task takes them: scaled and clipped, or counted from its first one."""
        if self.discrete:
            return actions + self.first_action
        return (actions * self.action_scale + self.action_bias).clamp(self.action_low, self.action_high)

    def deterministic_action(self, obs: Tensor) -> Tensor:
        """The likeliest action, ready for the task: obs [S, B, D] as the task gives it, actions [S, B, A]."""
        outputs = self.actor(self.normalize(obs))
        return self.to_task(outputs.argmax(-1, keepdim=True).float() if self.discrete else outputs)


class RunningMeanStd(nn.Module):
    """Mean and variance, per seed, of all valid rows so far (merging as in Chan et al., 1979)."""

    def __init__(self, num_seeds: int, size: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(num_seeds, 1, size))
        self.var = nn.Buffer(torch.ones(num_seeds, 1, size))
        self.count = nn.Buffer(torch.zeros(num_seeds, 1, 1))

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor) -> None:
        """Take in x [S, B, D] where valid [S, B]."""
        valid = valid.unsqueeze(-1)
        count = sum_rows(valid).unsqueeze(1)
        mean = masked_mean(x, valid).unsqueeze(1)
        var = masked_mean((x - mean).square(), valid).unsqueeze(1)
        # The variance of two groups together is the mean of their variances plus the variance of their means
        weight = count / (self.count + count).clamp(min=1)
        delta = mean - self.mean
        self.var.copy_(self.var * (1 - weight) + var * weight + delta.square() * weight * (1 - weight))
        self.mean.add_(delta * weight)
        self.count.add_(count)


# ------------------------------------------------------------------------------------------------------------ Algorithm


def sample(policy: tuple[Tensor, ...]) -> Tensor:
    """An action of each row, [S, B, A]."""
    if len(policy) == 1:  # -log of an exponential draw is Gumbel noise, and argmax(logits + Gumbel) a softmax draw
        return (policy[0] - torch.empty_like(policy[0]).exponential_().log()).argmax(-1, keepdim=True).float()
    mean, log_std = policy
    return mean + log_std.exp() * torch.randn_like(mean)


def log_prob(actions: Tensor, policy: tuple[Tensor, ...]) -> Tensor:
    """Log-probability of each row's action under a softmax, where it is one of 0, 1, ...; or its log-density under
    independent normals, summed over the action's dimensions."""
    if len(policy) == 1:
        return policy[0].log_softmax(-1).gather(-1, actions.long()).squeeze(-1)
    mean, log_std = policy
    z = (actions - mean) * torch.exp(-log_std)
    return -0.5 * z.square().sum(-1) - (log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(policy: tuple[Tensor, ...]) -> Tensor:
    if len(policy) == 1:
        log_probs = policy[0].log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)
    mean, log_std = policy
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).expand(mean.shape[:-1])


def sum_rows(x: Tensor) -> Tensor:
    """Sum over the rows of each seed: [S, B, ...] to [S, ...]."""
    return x.sum(1)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows of each seed: [S, B, ...] to [S, ...]."""
    return sum_rows(torch.where(valid, x, 0.0)) / sum_rows(valid).clamp(min=1)


def masked_var(x: Tensor, valid: Tensor) -> Tensor:
    """Variance over the valid rows of each seed: [S, B] to [S]."""
    return masked_mean((x - masked_mean(x, valid)[:, None]).square(), valid)


def compute_gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al., 2016, eq. 16). values is [T + 1, S, N], the rest [T, S, N].

    values[t + 1] belongs to the true next observation even where row t is the last of its episode (detail 3)."""
    delta = rewards + gamma * torch.where(terminated, 0.0, values[1:]) - values[:-1]
    advantages, trace = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        trace = delta[t] + gamma * gae_lambda * torch.where(done[t], 0.0, trace)
        advantages[t] = trace
    return advantages


def discounted_sums(rewards: Tensor, done: Tensor, carry: Tensor, gamma: float) -> Tensor:
    """sum_{k <= t} gamma^(t - k) r_k within each episode, [T, S, N]; `carry` [S, N] takes it to the next rollout."""
    sums = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        sums[t] = carry * gamma + rewards[t]
        carry.copy_(torch.where(done[t], 0.0, sums[t]))
    return sums


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the norm of each seed's gradient on its own. Returns the norms before, [S]."""
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten(1) for gradient in gradients], 1), dim=1)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None, None]
    torch._foreach_mul_(gradients, [scale] * len(gradients))
    return norm


def seeds_first(x: Tensor) -> Tensor:
    """[T, S, N, ...] to [S, T * N, ...]: row t * N + n is step t of environment n."""
    return x.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def compute_targets(agent: Agent, rollout: dict[str, Tensor], carry: Tensor, args: Args) -> dict[str, Tensor]:
    """What the update needs of a rollout, each [S, T * N, ...]: observations, actions, advantages, returns. Moves
    return_stats and carry on by this rollout, whose obs are [T + 1, S, N, D], actions [T, S, N, A], all else [T, S, N];
    carry is [S, N]."""
    obs = agent.normalize(seeds_first(rollout["obs"]))  # [S, (T + 1) * N, D]
    values = agent.critic(obs).squeeze(-1).unflatten(1, (-1, args.num_envs)).transpose(0, 1)  # [T + 1, S, N]
    done, valid = rollout["done"], seeds_first(rollout["valid"])
    rewards = torch.where(rollout["valid"], rollout["rewards"], 0.0)
    # Returns lie in the future; the discounted sum of past rewards has about their scale, and is known now
    sums = discounted_sums(rewards, done, carry, args.gamma)
    agent.return_stats.update(seeds_first(sums).unsqueeze(-1), valid)
    rewards = (rewards * (agent.return_stats.var + 1e-8).rsqrt().squeeze(-1)).clamp(-10, 10)
    advantages = compute_gae(rewards, values, rollout["terminated"], done, args.gamma, args.gae_lambda)
    batch = {"obs": obs[:, : args.batch_size], "actions": seeds_first(rollout["actions"])}
    batch["advantages"] = seeds_first(advantages)
    batch["returns"] = batch["advantages"] + seeds_first(values[:-1])
    if args.norm_adv:
        centred = batch["advantages"] - masked_mean(batch["advantages"], valid)[:, None]
        batch["advantages"] = centred / (masked_var(centred, valid).sqrt()[:, None] + 1e-8)
    # Losses mask reset rows. They are set to 0 here as well, because in a gradient 0 * inf is NaN.
    batch = {name: torch.where(valid if x.dim() == 2 else valid[..., None], x, 0) for name, x in batch.items()}
    return batch | {"valid": valid}


def bounds_loss(agent: Agent, policy: tuple[Tensor, ...]) -> Tensor:
    """Squared distance of a normal policy's mean from the action range, summed over the action's dimensions, [S, B]; 0
    for a softmax and for dimensions without bounds."""
    if agent.discrete:
        return torch.zeros_like(policy[0][..., 0])
    excess = policy[0] - (agent.to_task(policy[0]) - agent.action_bias) / agent.action_scale
    return excess.square().sum(-1)


LOSSES = ("policy_loss", "value_loss", "entropy", "bounds_loss", "grad_norm", "explained_variance")


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: dict[str, Tensor], carry: Tensor, args: Args
) -> dict[str, Tensor]:
    """One gradient step on the whole rollout of every seed. Returns LOSSES, [S] each."""
    batch = compute_targets(agent, rollout, carry, args)
    valid, returns = batch["valid"], batch["returns"]
    policy = agent.policy(batch["obs"])
    policy_loss = -masked_mean(log_prob(batch["actions"], policy) * batch["advantages"], valid)
    error = returns - agent.critic(batch["obs"]).squeeze(-1)
    value_loss = 0.5 * masked_mean(error.square(), valid)
    policy_entropy = masked_mean(entropy(policy), valid)
    outside = masked_mean(bounds_loss(agent, policy), valid)
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * policy_entropy + args.bounds_loss_coef * outside
    optimizer.zero_grad()
    loss.sum().backward()
    grad_norm = clip_grad_norm(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    if not agent.discrete:
        with torch.no_grad():
            agent.log_std.clamp_(min=args.log_std_min)
    agent.obs_stats.update(seeds_first(rollout["obs"][:-1]), valid)
    variance = masked_var(returns, valid)  # 0 where all are equal
    explained = (variance - masked_var(error.detach(), valid)) / variance.clamp(min=1e-8)
    terms = (policy_loss, value_loss, policy_entropy, outside, grad_norm, explained)
    return {name: term.detach() for name, term in zip(LOSSES, terms, strict=True)}


# ------------------------------------------------------------------------------------------------------------- Training


def train(args: Args) -> list[Path]:
    """Train args.num_seeds agents; return their run folders. Exit status 1 if one diverged, 128 + n after signal n."""
    S, N, T, last = args.num_seeds, args.num_envs, args.num_steps, args.trained_timesteps
    device = select_device(args)
    on_cuda = device.type == "cuda"
    folders, saved = find_checkpoint(args)
    step = saved["global_step"] if saved else 0
    envs = make_envs(args, spaced_seeds(args, N, 0, step))  # a simulator cannot be saved: resuming starts new episodes
    check_task(envs, args, gymnasium.spaces.Box, gymnasium.spaces.Discrete)
    action_space = envs.single_action_space
    agent = Agent(envs.single_observation_space, action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)  # a tensor: a CUDA graph would freeze a number
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(agent.parameters(), learning_rate, eps=1e-5, fused=True, capturable=on_cuda)
    else:
        for_graphs = {"foreach": on_cuda, "capturable": on_cuda}  # without foreach the learning rate would be read back
        optimizer = torch.optim.RMSprop(agent.parameters(), learning_rate, alpha=0.99, eps=1e-5, **for_graphs)
    state = agent.state_dict() | optimizer_state(optimizer, args.optimizer)  # all that training changes
    if saved:
        restore(state, saved.pop("state"))
    failed = diverged(agent)
    log = RunLog(args, device, folders or claim_folders(args), saved)

    # Collected in host memory (pinned, for CUDA), then shipped to the device in one piece.
    shapes = {"obs": (T + 1, S, N, agent.obs_dim), "actions": (T, S, N, agent.action_dim), "rewards": (T, S, N)}
    collected = {name: torch.zeros(shape, pin_memory=on_cuda) for name, shape in shapes.items()}
    for name in ("terminated", "done", "valid"):
        collected[name] = torch.zeros(T, S, N, dtype=torch.bool, pin_memory=on_cuda)
    data = {name: tensor.numpy() for name, tensor in collected.items()}  # the same memory, as the simulator sees it
    rollout = {name: tensor.to(device) for name, tensor in collected.items()}  # on a CPU the same memory once more
    obs_in = torch.zeros(S, N, agent.obs_dim, pin_memory=on_cuda)
    action_out, env_action_out = (torch.zeros(S, N, agent.action_dim, pin_memory=on_cuda) for _ in range(2))
    carry = torch.zeros(S, N, device=device)  # discounted reward of the running episodes, which scales rewards
    gradient_step = torch.compile(update) if args.compile else update
    losses = {name: torch.zeros(S, device=device) for name in LOSSES}  # sums since the last report

    @torch.no_grad()
    def act() -> None:
        actions = sample(agent.policy(agent.normalize(obs_in.to(device, non_blocking=True))))
        action_out.copy_(actions, non_blocking=True)
        env_action_out.copy_(agent.to_task(actions), non_blocking=True)

    def learn() -> None:
        for name, value in gradient_step(agent, optimizer, rollout, carry, args).items():
            losses[name].add_(value)

    act, learn = (capture(f, state | losses | {"carry": carry}, args, device) for f in (act, learn))  # on CUDA: graphs
    torch.manual_seed(spaced_seeds(args, 1, 2, step)[0])  # the noise of all seeds comes from one stream

    next_obs, done = envs.reset()[0], np.zeros((S, N), bool)
    iterations, saved_at = 0, time.perf_counter()
    with catch_signals() as signals:
        while step < last and len(failed) < S and not signals:
            # Collect T steps of every environment
            for t in range(T):
                obs_in.copy_(torch.from_numpy(next_obs.reshape(S, N, -1)))
                act()
                if on_cuda:
                    torch.cuda.current_stream(device).synchronize()
                data["obs"][t], data["actions"][t] = obs_in, action_out
                data["valid"][t] = ~done  # the step after the last one of an episode only resets
                next_obs, rewards, terminated, truncated, _ = envs.step(as_actions(env_action_out, action_space))
                done = data["done"][t] = (terminated | truncated).reshape(S, N)
                data["rewards"][t], data["terminated"][t] = rewards.reshape(S, N), terminated.reshape(S, N)
                log.count(data["rewards"][t], done, data["valid"][t])
            data["obs"][T] = next_obs.reshape(S, N, -1)
            for name, tensor in collected.items():
                rollout[name].copy_(tensor, non_blocking=True)

            # One gradient step on the whole rollout
            learning_rate.fill_(args.learning_rate * (1 - step / last if args.anneal_lr else 1))
            learn()
            step, iterations = step + args.batch_size, iterations + 1

            # Report
            evaluation_due = due(step, args.batch_size, args.num_evaluations, last)
            if evaluation_due or due(step, args.batch_size, 100, last):
                means = {name: (total / iterations).tolist() for name, total in losses.items()}  # waits for the device
                seconds = log.clock()
                episodes = args.final_eval_episodes if step == last else args.eval_episodes
                returns = evaluate(agent, args, episodes, step)["return"].mean(1) if evaluation_due else None
                log.report(step, seconds, means, returns)
                torch._foreach_zero_(list(losses.values()))
                iterations = 0
            if time.perf_counter() - saved_at > args.checkpoint_seconds:
                failed, saved_at = save_run(args, log, agent, state, step), time.perf_counter()
        failed = save_run(args, log, agent, state, step)
    envs.close()
    log.close()
    if args.capture_video and step == last:
        capture_video(agent, args, step, log.folders)
    if failed:
        print(f"diverged: seeds {', '.join(str(args.seed + k) for k in failed)}; any agent.pt is the last good one")
    if step < last or failed:
        raise SystemExit(128 + signals[0] if signals else 1)
    return log.folders


# ======================================================================================================================
# Surroundings: from here on the text is the same in all scripts of this folder.
# ======================================================================================================================


# ------------------------------------------------------------------------------------------------------------ Bad input


def refuse(message: str, error: BaseException | None = None) -> NoReturn:
    """What was asked for cannot work: say so in one line and exit with status 2."""
    reason = f": {(str(error) or repr(error)).splitlines()[0][:200]}" if error else ""
    print(f"{Path(__file__).name}: error: {message}{reason}", file=sys.stderr)
    raise SystemExit(2)


def check_ranges(args: Args) -> None:
    """Refuse what no training can use: numbers out of range, NaN, and the like. NumPy's numbers become plain ones."""
    vars(args).update({name: x.item() for name, x in vars(args).items() if isinstance(x, np.generic)})
    zero_too = ("env_threads", "torch_threads", "num_evaluations", "line_search_steps", "hidden_size")
    ranges = dict.fromkeys(zero_too, (0, 2**20)) | dict.fromkeys(("log_std_init", "log_std_min"), (-99, 2**53))
    ranges |= dict.fromkeys(("gamma", "gae_lambda", "tau", "line_search_decay"), (0, 1))
    ranges |= {"total_timesteps": (1, 2**53), "learning_starts": (1, 2**53), "utd_ratio": (0, 2**10)}
    ranges |= {"seed": (0, 2**32 - args.num_seeds)}  # of a larger one torch's CPU generator takes 32 bits
    ranges |= {"buffer_size": (1, 2**24)}  # rows are drawn by a float32, which has 24 bits
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        whole, default = Args.__annotations__.get(name) is int, getattr(Args, name, None) or 0
        # Of an argument of your own, what its default allows: negative numbers if that is negative
        own = (min(1, default * 2**20), max(default, 2**20)) if whole else (min(0, default * 2**53), 2**53)
        lowest, highest = ranges.get(name, own)
        if not lowest <= value <= highest:
            refuse(f"{name} = {value} is out of range")
        if name in ("num_envs", "eval_episodes", "final_eval_episodes") and args.num_seeds * value > 2**16:
            refuse(f"{name} = {value} for each of {args.num_seeds} seeds is out of range")
    if args.capture_video and not HAS_EGL:
        refuse("capture_video needs the library libEGL.so.1 (Debian, Ubuntu: apt install libegl1)")
    if getattr(args, "log_std_init", 0) < getattr(args, "log_std_min", -99):
        refuse(f"log_std_init = {args.log_std_init} is below log_std_min = {args.log_std_min}")
    if args.trained_timesteps < 1:
        refuse(f"total_timesteps = {args.total_timesteps} is less than one iteration")


def usable_cores() -> int:
    """The cores that this process may use, which a batch scheduler or a container may have limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's quota, "150000 100000", or "max 100000"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def select_device(args: Args) -> torch.device:
    torch.set_num_threads(args.torch_threads or usable_cores())
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if args.device == "auto" else args.device)
        if device.type not in ("cpu", "cuda"):
            refuse(f"device {args.device!r} is neither a CPU nor a CUDA device")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"device {args.device!r} cannot be used", error)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are captured on the current device
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # where a gradient stays 0, Adam's moments decay to denormals, slow on a CPU
        if sys.platform == "linux":  # keep freed memory: page faults can take half of an update
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
            mallopt(-4, 0)  # M_MMAP_MAX: and large arrays come from it
    return device


# ---------------------------------------------------------------------------------------------------------- Environment


def task_settings(env_id: str, env_kwargs: dict[str, str]) -> dict[str, Any]:
    """`env_kwargs` with each value in the type of the task's own default."""
    if env_id not in (tasks := envpool.list_all_envs()):
        near = difflib.get_close_matches(env_id, tasks, n=4, cutoff=0.5)
        refuse(f"there is no task {env_id!r}" + (f"; the nearest are {', '.join(near)}" if near else ""))
    config = envpool.make_spec(env_id).config._asdict()
    names = list(config)[list(config).index("max_episode_steps") :]  # what comes before is the pool's own
    settings: dict[str, Any] = {}
    for name, text in env_kwargs.items():
        if name not in names:
            refuse(f"{env_id} has no setting {name!r}; it has {', '.join(names)}")
        kind = type(config[name])
        try:
            settings[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            refuse(f"{name} of {env_id} is of type {kind.__name__}, which {text!r} is not")
    return settings


def make_envs(args: Args, env_seeds: list[int], render_mode: str | None = None) -> Any:
    """One pool with an environment per seed given. This is the function to replace for a task of your own: any
    gymnasium.vector.VectorEnv will do whose episodes end and whose metadata["autoreset_mode"] is NextStep, Gymnasium's
    default."""
    threads = min(args.env_threads or usable_cores(), len(env_seeds))
    pool = {"num_envs": len(env_seeds), "num_threads": threads, "env_seed": env_seeds, "render_mode": render_mode}
    try:
        return envpool.make(args.env_id, "gymnasium", **pool, **task_settings(args.env_id, args.env_kwargs))
    except Exception as error:  # libraries or files that are missing, a value that the task cannot take
        refuse(f"EnvPool cannot make {args.env_id} {args.env_kwargs or ''}", error)


def spaced_seeds(args: Args, num_envs: int, *stream: int) -> list[int]:
    """`num_envs` environment seeds per agent. Neighbouring seeds share none but by chance, nor do two streams of the
    same seed: 0, 1 or 2 (training, evaluation, noise), the step at which it starts and, in PPO, the rank."""
    sequences = [np.random.SeedSequence((args.seed + k, *stream)) for k in range(args.num_seeds)]
    return np.concatenate([sequence.generate_state(num_envs) >> 1 for sequence in sequences]).tolist()  # int32


def as_actions(actions: Tensor, space: gymnasium.Space) -> np.ndarray:
    """Actions, a row per environment, in the task's shape and type, clipped to bounds that rounding may overstep."""
    rows = np.nan_to_num(actions.numpy())  # a NaN would stay in the simulator for good
    rows = rows.reshape(-1, *space.shape).astype(space.dtype)
    return rows.clip(space.low, space.high) if isinstance(space, gymnasium.spaces.Box) else rows


def check_task(envs: Any, args: Args, *action_types: type) -> None:
    names = " or ".join(kind.__name__ for kind in action_types)
    if not isinstance(envs.single_observation_space, gymnasium.spaces.Box):
        refuse(f"{args.env_id} observes a {type(envs.single_observation_space).__name__}; this script takes Box")
    if not isinstance(envs.single_action_space, action_types):
        refuse(f"{args.env_id} takes {type(envs.single_action_space).__name__} actions; this script takes {names}")
    mode = (envs.metadata or {}).get("autoreset_mode")
    mode = getattr(mode, "value", mode)
    if mode != gymnasium.vector.AutoresetMode.NEXT_STEP.value:
        refuse(f"{args.env_id} resets in the mode {mode} (its metadata's autoreset_mode); this script takes NextStep")
    if (players := getattr(envs, "config", {}).get("max_num_players", 1)) > 1:
        refuse(f"{args.env_id} has {players} players; this script takes one")
    if args.capture_video:  # some tasks have no picture: better known now than after training
        try:
            make_envs(args, [0], "rgb_array").render(env_ids=[0])
        except Exception as error:
            refuse(f"{args.env_id} cannot be filmed", error)


# -------------------------------------------------------------------------------------------------------------- Logging


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: a kill at any moment leaves the old file or the new one. So
    does a full disk, which ends the run."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises one of its own while it handles a full disk's
        beside.unlink(missing_ok=True)
        refuse(f"{path} cannot be written", error if isinstance(error, OSError) else error.__context__ or error)


def due(step: int, stride: int, times: int, total: int) -> bool:
    """Whether one of `times` evenly spaced marks, the last of them `total`, was passed in the `stride` up to `step`."""
    return step * times // total > (step - stride) * times // total


class RunLog:
    """What a run leaves and shows, a folder per seed: episode statistics, metrics.csv, TensorBoard events, config.json,
    the progress bar and the training clock, which stands still while agents are evaluated."""

    COLUMNS = "global_step,wall_seconds,episodic_return,eval_return,steps_per_second"

    def __init__(self, args: Args, device: torch.device, folders: list[Path], saved: dict[str, Any] | None) -> None:
        S, total = args.num_seeds, args.trained_timesteps
        self.running = np.zeros((2, S, args.num_envs))  # return and length of the episodes under way
        start = saved or {"global_step": 0, "seconds": 0.0, "rows": [[] for _ in folders], "episodes": [[]] * S}
        step, self.seconds, self.rows = start["global_step"], start["seconds"], start["rows"]
        self.episodes = [deque(own, maxlen=100) for own in start["episodes"]]  # return and length of the last 100
        self.folders, self.step, self.since = folders, step, time.perf_counter()
        git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # says nothing without git or a repository
        described = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        versions = {package.__name__: package.__version__ for package in (torch, np, envpool, gymnasium)}
        versions["python"] = platform.python_version()
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "device": str(device), "gpu": gpu}
        config = {"args": asdict(args), "trained_timesteps": total, "versions": versions, "hardware": hardware}
        config["git_commit"] = described.stdout.strip() or None
        config["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        if saved and (earlier := folders[0] / "config.json").exists():
            before = json.loads(earlier.read_text())
            part = {key: value for key, value in before.items() if key not in ("args", "resumed")}
            config["resumed"] = [*before.get("resumed", []), {"at_step": step, "before": part}]
        self.lock = os.open(folders[0] / ".lock", os.O_RDWR | os.O_CREAT)
        try:  # --resume may have found a run that still goes on
            os.lockf(self.lock, os.F_TLOCK, 0)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # else the file system has no locks
                refuse(f"another process trains in {folders[0]}")
        for k, folder in enumerate(folders):
            config["args"]["seed"] = args.seed + k
            with replacing(folder / "config.json") as path:
                path.write_text(json.dumps(config, indent=2))
        # purge_step: what a killed run wrote after its last checkpoint will be written again
        self.writers = [SummaryWriter(str(folder), purge_step=step + 1 if saved else None) for folder in folders]
        print(f"{args.env_id}: {total} steps of {S} seed{'s' * (S > 1)} on {device}\n{folders[0]}", flush=True)
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=total, initial=step, unit_scale=True, disable=None, dynamic_ncols=True, bar_format=layout)

    def count(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        """Take in one step of all environments for the episode statistics; arrays are [S, N]."""
        self.running += np.stack([np.where(valid, rewards, 0.0), valid])
        for k, env in np.argwhere(done):
            self.episodes[k].append(self.running[:, k, env].tolist())
        self.running[:, done] = 0.0

    def clock(self) -> float:
        """Seconds of training so far."""
        return self.seconds + time.perf_counter() - self.since

    def report(self, step: int, seconds: float, losses: dict[str, list[float]], returns: np.ndarray | None) -> None:
        """A row of metrics.csv and a point of every TensorBoard curve for each seed; losses and returns of evaluations
        are [S]. The clock goes on from `seconds`, what it showed before the evaluation."""
        speed = len(self.folders) * (step - self.step) / (seconds - self.seconds)
        self.step, self.seconds = step, seconds
        recent = np.array([np.mean(own, axis=0) if own else (np.nan, np.nan) for own in self.episodes])  # [S, 2]
        for k, (folder, writer) in enumerate(zip(self.folders, self.writers, strict=True)):
            evaluated = np.nan if returns is None else returns[k]
            scalars = {"charts/episodic_return": recent[k, 0], "charts/episodic_length": recent[k, 1]}
            scalars |= {"charts/SPS": speed, "eval/episodic_return": evaluated}
            scalars |= {f"losses/{name}": values[k] for name, values in losses.items()}
            for tag, value in scalars.items():
                if not np.isnan(value):
                    writer.add_scalar(tag, value, step)
            writer.flush()
            numbers = [f"{x:.8g}" if np.isfinite(x) else "" for x in (self.seconds, recent[k, 0], evaluated, speed)]
            self.rows[k].append(",".join([str(step), *numbers]))
            with replacing(folder / "metrics.csv") as path:
                path.write_text("\n".join([self.COLUMNS, *self.rows[k], ""]))
        self.bar.set_postfix_str(f"return {recent[:, 0].mean():.6g}, {speed:.0f} steps/s", refresh=False)
        self.bar.total = max(self.bar.total, step)  # REINFORCE's whole episodes may end a little later than planned
        self.bar.update(step - self.bar.n)
        if returns is not None:
            each = " ".join(f"{value:.6g}" for value in returns)
            with contextlib.suppress(OSError):  # the terminal, or who read the output, may have gone
                self.bar.write(f"step {step}: evaluation return {returns.mean():.6g} (by seed: {each})")
        self.since = time.perf_counter()

    def close(self) -> None:
        os.close(self.lock)
        self.bar.close()
        for writer in self.writers:
            writer.close()


# ----------------------------------------------------------------------------------------------------------- Checkpoint


def save(path: Path, kind: str, **content: Any) -> None:
    with replacing(path) as beside, open(beside, "wb") as file:
        torch.save({"kind": f"{Path(__file__).stem} {kind}", **content}, file)


def load(path: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Folder and content of what `save` wrote. Only tensors and plain values get in: a hostile file cannot run code."""
    path = path / f"{kind}.pt" if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"]
    except Exception as error:  # missing, truncated, corrupt and foreign files fail in many ways
        refuse(f"{path} cannot be read as {kind}", error)
    if found != f"{Path(__file__).stem} {kind}":
        refuse(f"{path} is a {found}, not a {Path(__file__).stem} {kind}")
    return path.parent, content


def restore(state: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copy `saved` into the tensors of `state`, in place: recorded graphs hold their addresses."""
    for name in state | saved:
        expected, found = (tuple(side[name].shape) if name in side else None for side in (state, saved))
        if found != expected:
            refuse(f"the saved state does not fit: {name} is {found}, not {expected}")
        state[name].copy_(saved[name])


def diverged(agent: nn.Module) -> list[int]:
    """The seeds (counted from 0) of which a weight or a statistic is not finite any more."""
    finite = torch.stack([x.isfinite().reshape(len(x), -1).all(1) for x in agent.state_dict().values()]).all(0)
    return (~finite).nonzero().flatten().tolist()


def save_run(args: Args, log: RunLog, agent: nn.Module, state: dict[str, Tensor], step: int) -> list[int]:
    """checkpoint.pt in the first seed's folder: all that training needs again, for all seeds. agent.pt in each folder:
    all that acting needs. Nothing overwrites the last good agent of a seed that has diverged; returns those seeds."""
    failed = diverged(agent)
    for k, folder in enumerate(log.folders):
        if k not in failed:
            own = {name: tensor[k : k + 1].clone() for name, tensor in agent.state_dict().items()}
            own_args = asdict(args) | {"seed": args.seed + k, "num_seeds": 1}
            save(folder / "agent.pt", "agent", args=own_args, agent=own, global_step=step)
    if len(failed) < args.num_seeds:
        content = {"args": asdict(args), "global_step": step, "seconds": log.clock(), "rows": log.rows}
        content |= {"episodes": [list(own) for own in log.episodes], "folders": [folder.name for folder in log.folders]}
        save(log.folders[0] / "checkpoint.pt", "checkpoint", state=state, **content)
    return failed


def find_checkpoint(args: Args) -> tuple[list[Path], dict[str, Any] | None]:
    """The folders and the content of the checkpoint to go on from; none if there is none."""
    candidates = [] if args.resume is None else [Path(args.resume).resolve()]
    if args.resume == "auto":
        name = f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__"  # no glob pattern: it may hold * or [
        found = {path.parent.name.removeprefix(name): path for path in Path(args.run_dir).glob("*/checkpoint.pt")}
        candidates = [found[stamp] for stamp in sorted(filter(str.isdecimal, found), key=int, reverse=True)]
    for path in candidates:
        first, saved = load(path, "checkpoint")
        now, then = asdict(args), saved["args"]
        names = [name for name in now if now[name] != then.get(name) and name not in ("resume", "run_dir")]
        if now["total_timesteps"] > then["total_timesteps"]:  # a run may be made longer
            names.remove("total_timesteps")
        if not names:
            if first.name != saved["folders"][0] and args.num_seeds > 1:  # a copy: its seeds are not those beside it
                refuse(f"{first} was {saved['folders'][0]}; a run of several seeds goes on under its own names")
            return [first, *(first.parent / name for name in saved["folders"][1:])], saved
        if args.resume != "auto":
            refuse(f"{path} was made with another {', '.join(names)}")
    return [], None


def claim_folders(args: Args) -> list[Path]:
    """A new folder per seed. The timestamp in their names moves on while another run has it."""
    stem = f"{args.env_id.replace('/', '_')}__{args.exp_name}"
    Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    for stamp in itertools.count(int(time.time())):
        folders = [Path(args.run_dir, f"{stem}__{args.seed + k}__{stamp}") for k in range(args.num_seeds)]
        with contextlib.suppress(FileExistsError):
            for folder in folders:
                folder.mkdir()
            return folders


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """In here, Ctrl-C and SIGTERM put their number into the list, for the loop to look at. A third of a kind ends the
    process as usual; not the second, since one request may arrive twice, by the process group and by the parent."""
    signals, owner = [], os.getpid()

    def note(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a worker of a vector environment, forked in here
            os._exit(128 + number)
        signals.append(number)
        if signals.count(number) > 1:
            signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------- Evaluation


@torch.no_grad()
def evaluate(
    agent: Agent, args: Args, num_episodes: int, step: int, films: list[list[np.ndarray]] | None = None, every: int = 1
) -> dict[str, np.ndarray]:
    """The first episode of each of `num_episodes` fresh environments per seed, by the deterministic action and the
    agent's frozen statistics. Arrays are [S, num_episodes]; `return` is the task's own, neither normalised nor
    discounted, NaN for a seed that has diverged; the x velocity and the mean squared action are means over the
    episode, NaN where there is none. Into `films`, a list for each environment, goes a picture every `every` steps."""
    shape = (args.num_seeds, num_episodes)
    envs = make_envs(args, spaced_seeds(args, num_episodes, 1, step), "rgb_array" if films else None)
    totals = {name: np.zeros(shape) for name in ("return", "length", "x_velocity", "squared_action")}
    running, obs = np.ones(shape, bool), envs.reset()[0]
    while running.any():
        if films and totals["length"].max() % every == 0:
            for i in np.flatnonzero(running):
                films[i].append(envs.render(env_ids=[i])[0])
        rows = torch.as_tensor(obs.reshape(*shape, -1), dtype=torch.float32, device=next(agent.parameters()).device)
        actions = agent.deterministic_action(rows).cpu()
        obs, rewards, terminated, truncated, info = envs.step(as_actions(actions, envs.single_action_space))
        totals["return"] += np.where(running, rewards.reshape(shape), 0.0)  # 0 times what is not finite would be NaN
        totals["length"] += running
        velocity = np.reshape(info.get("x_velocity", np.full(running.size, np.nan)), shape)
        totals["x_velocity"] += np.where(running, velocity, 0.0)
        squared = actions.square() if envs.single_action_space.shape else torch.full((*shape, 1), torch.nan)  # discrete
        totals["squared_action"] += np.where(running, squared.numpy().mean(-1), 0.0)
        running &= ~(terminated | truncated).reshape(shape)
    envs.close()
    totals["return"][diverged(agent)] = np.nan
    return totals | {name: totals[name] / totals["length"] for name in ("x_velocity", "squared_action")}


def capture_video(agent: Agent, args: Args, step: int, folders: list[Path]) -> None:
    """The first episode of each seed's evaluation at `step`, to videos/ in its run folder. The film is twenty seconds
    at most: of a long episode it has every second step, every third, and so on. EnvPool only."""
    longest = int(evaluate(agent, args, 1, step)["length"].max())  # the same episodes, unfilmed
    films: list[list[np.ndarray]] = [[] for _ in folders]
    evaluate(agent, args, 1, step, films, max(1, longest // 250))
    gif = args.capture_video == "gif"
    stride, options = (2, {"duration": 40, "loop": 0}) if gif else (1, {"fps": 25, "macro_block_size": 2})
    for folder, film in zip(folders, films, strict=True):
        path = folder / "videos" / f"episode.{args.capture_video}"
        path.parent.mkdir(exist_ok=True)
        imageio.mimsave(path, [frame[::stride, ::stride] for frame in film], **options)


def evaluate_saved(args: Args) -> None:
    """--evaluate: what a trained agent does on its task, printed and, by episode, written to evaluation.csv in its
    folder: after a finished run the episodes of its last evaluation again. --env-kwargs changes the task,
    --capture-video films it."""
    device = select_device(args)
    folder, saved = load(Path(args.evaluate or ""), "agent")
    asked, default = asdict(args), asdict(Args())
    own = {name: saved["args"].get(name, value) for name, value in default.items()}  # Args may have changed since
    used = ("device", "env_threads", "torch_threads", "final_eval_episodes", "capture_video")
    for name in asked:
        if name not in (*used, "evaluate", "env_kwargs") and asked[name] not in (default[name], own[name]):
            refuse(f"{name} = {asked[name]} has no effect on --evaluate: the agent comes with {own[name]}")
    args = Args(**own | {name: asked[name] for name in used} | {"env_kwargs": own["env_kwargs"] | args.env_kwargs})
    envs = make_envs(args, [0])
    check_task(envs, args, gymnasium.Space)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    restore(agent.state_dict(), saved["agent"])
    episodes = evaluate(agent, args, args.final_eval_episodes, saved["global_step"])
    task = " ".join([args.env_id, *itertools.chain(*args.env_kwargs.items())])
    print(f"{task}, {args.final_eval_episodes} episodes, mean and standard deviation:")
    for name, values in episodes.items():
        if not np.isnan(values).all():
            print(f"  {name:<15}{values.mean():12.6g} +- {values.std():.4g}")
    with replacing(folder / "evaluation.csv") as beside:
        np.savetxt(beside, np.concatenate([*episodes.values()]).T, "%.8g", ",", header=",".join(episodes), comments="")
    if args.capture_video:
        capture_video(agent, args, saved["global_step"], [folder])


# ----------------------------------------------------------------------------------------------------------- CUDA graph


def capture(function: Callable[[], None], state: dict[str, Tensor], args: Args, device: torch.device) -> Callable:
    """Record `function` as one CUDA graph and return its replay; on a CPU return the function itself.

    What it reads and writes must stay at its address, and nothing in it may wait for the host. CUDA asks for a warm-up,
    which really runs: `state`, all that the function changes and needs again, and the generator are put back."""
    if device.type != "cuda" or not args.cuda_graphs:
        return function
    saved, generator = {name: tensor.clone() for name, tensor in state.items()}, torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    restore(state, saved)
    torch.cuda.set_rng_state(generator, device)
    gc.collect()  # graphs of an earlier run must not be destroyed in the middle of this recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def optimizer_state(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """The optimiser's tensors by name. A step with zero gradients, which moves nothing, makes them now: graphs and
    checkpoints refer to them before the first real step."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for own in optimizer.state.values():
        own["step"].zero_()
    return {f"{name}.{i}.{key}": t for i, own in enumerate(optimizer.state.values()) for key, t in own.items()}


def main() -> None:
    """The command line. What the machine refuses (a full disk, a folder that cannot be made, too little memory) is one
    line as well."""
    if sum(word.replace("_", "-").partition("=")[0] == "--env-kwargs" for word in sys.argv) > 1:
        refuse("--env-kwargs is given twice; it takes all settings at once: NAME VALUE NAME VALUE ...")
    args = tyro.cli(Args)
    run = train if args.evaluate is None else evaluate_saved
    try:
        run(args)
    except (OSError, MemoryError, RuntimeError) as error:
        words = ("allocate", "size calculation", "out of memory", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        refuse("the machine cannot do it", error)


if __name__ == "__main__":
    main()
