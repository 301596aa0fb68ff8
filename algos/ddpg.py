# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "envpool==1.2.5", "gymnasium==1.4.0", "tyro", "tensorboard", "tqdm", "imageio[ffmpeg]"]
# ///
"""Deep Deterministic Policy Gradient (Lillicrap et al., 2016, arXiv:1509.02971).

The idea: Q-learning for continuous actions. The maximum over actions is replaced by an actor that is trained to find
it, by the gradient that runs from Q through the action; noise on the action explores, and a replay keeps the past. Old
transitions stay usable, since the value y to which Q is fitted takes the next action from (a slow copy of) today's
policy, not from the one that acted. Slow copies of both networks, the targets, keep y from moving with every step of Q.

    J = E[ sum_t gamma^t r_t ]                                               objective
    y = r + gamma * (1 - terminated) * Q_target(s', pi_target(s'))           td_target
    critic: min E_replay[ (Q(s, a) - y)^2 ]                                  algorithm 1, update
    actor: max E_replay[ Q(s, pi(s)) ]                                       deterministic policy gradient, update
        grad J ~ E_replay[ grad_a Q(s, a) grad pi(s) ],  a = pi(s)           eq. 6: s from the replay, without gamma^t
    Q_target <- (1 - tau) * Q_target + tau * Q,  and pi_target likewise      Polyak averaging; equal at the start
    a = clip(pi(s) + sigma * scale * xi),  xi ~ N(0, 1)                      exploration, sigma: exploration_noise

    python algos/ddpg.py --env-id HalfCheetah-v4
    python algos/ddpg.py --env-id Walker2d-v4 --num-seeds 3                                # three agents, one process
    python algos/ddpg.py --env-id Walker2d-v4 --exploration-noise 0.2

Details that matter:
 1. Seed axis: every tensor of a network is [S, ...] and one batched product trains S independent agents. Losses are
    summed over seeds, so no seed affects another; each has its own replay. Shapes: S seeds, N environments of each, B
    rows of a batch, D and A dimensions of observation and action.
 2. Next-step auto-reset: the step after `done` ignores its action and returns the first observation of the new
    episode. That row, the reset row, is not a transition: it is never stored.
 3. next_obs is the true next observation, that of an episode's last step included: truncation bootstraps from it,
    termination does not.
 4. utd_ratio is the number of updates per environment step of a seed: 16 updates go with a step of 16 environments.
    They run once the actions are chosen (on a GPU while the simulator steps), so a step's own transitions can be drawn
    from the next step on.
 5. Noise is normal, drawn anew for every environment and every dimension of the action, whose scale is half its range.
 6. The gradient runs from Q through the action into the policy; the critic's own weights get none of it.
 7. Observations and rewards are taken as they are.
 8. The critic's learning rate is the larger one: the actor climbs the current Q, so Q should be accurate first. Yet it
    climbs Q's errors too, and the target repeats them: nothing bounds Q from above. On Walker2d-v4, whose episodes end
    early, losses/q_values rises to thousands within a million steps, and to hundreds with a slower critic
    (--critic-learning-rate 3e-4), which returns 2.4 times as much there, 3 % less on HalfCheetah-v4 and 31 % less on
    Hopper-v4, where returns rise and fall with either rate: two seeds each (the default four on Walker2d-v4), so none
    of these differences is significant.
Deviations from the paper (the paper's in brackets): 3 (always bootstraps), 4 (one environment, one update a step),
uncorrelated noise of 0.1 (Ornstein-Uhlenbeck of 0.2), random actions at first, the action enters the critic's first
layer (second), 256 x 256 units (400, 300), an actor's learning rate of 3e-4 (1e-4), batches of 256 (64), tau 0.005
(0.001), orthogonal initialisation (uniform), no batch normalisation, no weight decay.
"""

import contextlib
import ctypes
import difflib
import gc
import hashlib
import itertools
import json
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
    num_envs: int = 16  # environments per seed

    # Algorithm
    buffer_size: int = 1_000_000  # transitions that the replay of each seed holds
    learning_starts: int = 25_000  # steps of random actions before the first update
    utd_ratio: float = 1.0  # updates per environment step, whatever the number of environments
    batch_size: int = 256  # transitions per update
    learning_rate: float = 3e-4  # of the actor, by Adam
    critic_learning_rate: float = 1e-3  # of the critic, by Adam
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak step of the targets: target += tau * (network - target)
    exploration_noise: float = 0.1  # standard deviation of the noise, in units of half the action range
    hidden_size: int = 256  # units in each of the two hidden layers; 0 is none: linear
    save_replay: bool = False  # checkpoint the replay as well, all buffer_size rows; else resuming refills it first

    # Speed
    env_threads: int = 0  # threads of EnvPool; 0 is one per core
    torch_threads: int = 0  # threads of torch on a CPU; 0 is one per core; more than there are free cores slow it down
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
        if self.num_envs > self.buffer_size:
            refuse(f"a replay of {self.buffer_size} transitions does not hold a step of {self.num_envs} environments")
        # An iteration learns and then steps: the first one that learns begins at a multiple of num_envs
        learning = self.trained_timesteps + -self.learning_starts // self.num_envs * self.num_envs
        if self.utd_ratio * learning < 1 - 1e-6:
            left = f"total_timesteps leaves {max(0, learning)} steps after learning_starts"
            refuse(f"nothing is learned: {left}, utd_ratio = {self.utd_ratio}")

    @property
    def trained_timesteps(self) -> int:
        """A last step that not all environments could take is not run."""
        return self.total_timesteps // self.num_envs * self.num_envs


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
    """Actors of S seeds. Every tensor of `state_dict()` starts with the seed axis, so `[k:k+1]` of each is the agent of
    seed k alone, and the initial weights of a seed do not depend on the other seeds."""

    def __init__(self, obs_space: gymnasium.spaces.Box, action_space: gymnasium.spaces.Box, args: Args) -> None:
        super().__init__()
        self.obs_dim, self.action_dim = int(np.prod(obs_space.shape)), int(np.prod(action_space.shape))
        self.exploration_noise = args.exploration_noise
        generators = [torch.Generator().manual_seed(args.seed + k) for k in range(args.num_seeds)]
        sizes = [self.obs_dim, args.hidden_size, args.hidden_size, self.action_dim]
        # ReLU in place: on a CPU an update waits for memory, and this is an array less to write
        self.actor = mlp(sizes, lambda: nn.ReLU(inplace=True), 0.01, generators)
        low, high = torch.tensor(action_space.low).float().ravel(), torch.tensor(action_space.high).float().ravel()
        if not ((high - low > 0) & (high - low).isfinite()).all():
            refuse(f"the actions of {args.env_id} have no finite range, to which the policy could be squashed")
        self.action_low, self.action_high = nn.Buffer(low, persistent=False), nn.Buffer(high, persistent=False)
        self.action_scale = nn.Buffer((high - low) / 2, persistent=False)
        self.action_bias = nn.Buffer((high + low) / 2, persistent=False)

    def random_action(self, obs: Tensor) -> Tensor:
        """Uniform within the bounds, [S, B, A]."""
        noise = 2 * torch.rand(*obs.shape[:2], self.action_dim, device=self.action_scale.device) - 1
        return noise * self.action_scale + self.action_bias

    def deterministic_action(self, obs: Tensor) -> Tensor:
        """pi(s), ready for the task: obs [S, B, D], actions [S, B, A]."""
        return self.actor(obs).tanh() * self.action_scale + self.action_bias

    def exploration_action(self, obs: Tensor) -> Tensor:
        """pi(s) with noise of its own in every environment and dimension, ready for the task."""
        actions = self.deterministic_action(obs)
        noise = self.exploration_noise * self.action_scale * torch.randn_like(actions)
        return (actions + noise).clamp(self.action_low, self.action_high)


def make_critic(agent: Agent, args: Args) -> nn.Sequential:
    generators = [torch.Generator().manual_seed(args.seed + k) for k in range(args.num_seeds)]
    sizes = [agent.obs_dim + agent.action_dim, args.hidden_size, args.hidden_size, 1]
    return mlp(sizes, lambda: nn.ReLU(inplace=True), 1.0, generators).to(agent.action_scale.device)


class Replay:
    """The last `capacity` transitions of each seed. One packed row each (obs, next_obs, action, reward, terminated), so
    that a sample is one gather; one place more takes the rows that are no transition, and is never drawn."""

    def __init__(self, num_seeds: int, capacity: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.capacity, self.sizes = capacity, [obs_dim, obs_dim, action_dim, 1, 1]
        self.rows = torch.empty(num_seeds, capacity + 1, sum(self.sizes), device=device)
        self.count = torch.zeros(num_seeds, 1, dtype=torch.int64, device=device)  # stored so far
        self.seed_index = torch.arange(num_seeds, device=device)[:, None]

    def add(self, rows: Tensor, valid: Tensor) -> None:
        """Store packed rows [S, N, sum(sizes)] where valid [S, N], over the oldest ones."""
        place = (self.count + valid.cumsum(1) - 1) % self.capacity
        self.rows[self.seed_index, torch.where(valid, place, self.capacity)] = rows
        self.count += valid.sum(1, keepdim=True)

    def sample(self, batch_size: int) -> list[Tensor]:
        """obs, next_obs, actions [S, B, ...], rewards, terminated [S, B]: drawn evenly, with replacement."""
        stored = self.count.clamp(1, self.capacity)
        index = (torch.rand(len(stored), batch_size, device=stored.device) * stored).long()
        obs, next_obs, actions, rewards, terminated = self.rows[self.seed_index, index].split(self.sizes, dim=-1)
        return [obs, next_obs, actions, rewards.squeeze(-1), terminated.squeeze(-1)]


# ------------------------------------------------------------------------------------------------------------ Algorithm


def q_value(critic: nn.Sequential, obs: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a) of rows [S, B, ...], [S, B]."""
    return critic(torch.cat([obs, actions], dim=-1)).squeeze(-1)


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """r + gamma * (1 - terminated) * next_values, the values of s'; all [S, B]. Truncation does not end the sum."""
    return rewards + gamma * torch.where(terminated > 0, 0.0, next_values)  # 0 times what is not finite would be NaN


LOSSES = ("critic_loss", "actor_loss", "q_values")


def update(
    agent: Agent,
    critic: nn.Sequential,
    agent_target: Agent,
    critic_target: nn.Sequential,
    actor_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    replay: Replay,
    args: Args,
) -> dict[str, Tensor]:
    """One update of every seed's critic, actor and targets. Returns LOSSES, [S] each."""
    obs, next_obs, actions, rewards, terminated = replay.sample(args.batch_size)
    with torch.no_grad():
        next_values = q_value(critic_target, next_obs, agent_target.deterministic_action(next_obs))
        y = td_target(rewards, terminated, next_values, args.gamma)
    q = q_value(critic, obs, actions)  # [S, B]
    critic_loss = (q - y).square().mean(-1)
    critic_optimizer.zero_grad()
    critic_loss.sum().backward()
    critic_optimizer.step()

    critic.requires_grad_(False)  # saves a gradient that nobody uses
    actor_loss = -q_value(critic, obs, agent.deterministic_action(obs)).mean(-1)
    critic.requires_grad_(True)
    actor_optimizer.zero_grad()
    actor_loss.sum().backward()
    actor_optimizer.step()
    with torch.no_grad():
        for new, average in ((agent, agent_target), (critic, critic_target)):
            torch._foreach_lerp_(list(average.parameters()), list(new.parameters()), args.tau)
    terms = (critic_loss, actor_loss, q.mean(-1))
    return {name: term.detach() for name, term in zip(LOSSES, terms, strict=True)}


# ------------------------------------------------------------------------------------------------------------- Training


def train(args: Args) -> list[Path]:
    """Train args.num_seeds agents; return their run folders. Exit status 1 if one diverged, 128 + n after signal n."""
    S, N, last = args.num_seeds, args.num_envs, args.trained_timesteps
    device = select_device(args)
    on_cuda = device.type == "cuda"
    folders, saved = find_checkpoint(args)
    step = saved["global_step"] if saved else 0
    refill_from = 0 if args.save_replay else step  # the step at which the replay is empty
    envs = make_envs(args, spaced_seeds(args, N, 0, step))  # a simulator cannot be saved: resuming starts new episodes
    check_task(envs, args, gymnasium.spaces.Box)
    action_space = envs.single_action_space
    agent = Agent(envs.single_observation_space, action_space, args).to(device)
    agent_target = Agent(envs.single_observation_space, action_space, args).to(device).requires_grad_(False)
    critic, critic_target = make_critic(agent, args), make_critic(agent, args).requires_grad_(False)  # equal at first
    adam = {"fused": True, "capturable": on_cuda}
    actor_optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, **adam)
    state = agent.state_dict() | agent_target.state_dict(prefix="agent_target.")  # all that training changes
    state |= critic.state_dict(prefix="critic.") | critic_target.state_dict(prefix="critic_target.")
    state |= optimizer_state(actor_optimizer, "actor_adam") | optimizer_state(critic_optimizer, "critic_adam")
    replay = Replay(S, args.buffer_size, agent.obs_dim, agent.action_dim, device)
    # What graphs change; not the replay's rows, for nothing is valid yet when they are recorded, so nothing is stored
    touched = state | {"replay.count": replay.count}
    if args.save_replay:
        state = touched | {"replay.rows": replay.rows}
    if saved:
        restore(state, saved.pop("state"))
        if refill_from and step < last:
            lost = min(args.learning_starts, last - step)
            print(f"without --save-replay, {lost} of the {last - step} steps left refill the replay, without learning")
    # A policy that has been trained refills the replay itself; before that, random actions fill it
    trained = bool(state["actor_adam.0.step"].any())
    random_until = 0 if trained else refill_from + args.learning_starts
    failed = diverged(agent)
    log = RunLog(args, device, folders or claim_folders(args), saved)

    # Host memory (pinned, for CUDA) through which observations, actions and transitions pass
    obs_in = torch.zeros(S, N, agent.obs_dim, pin_memory=on_cuda)
    action_out = torch.zeros(S, N, agent.action_dim, pin_memory=on_cuda)
    row_in = torch.zeros(S, N, sum(replay.sizes), pin_memory=on_cuda)
    valid_in = torch.zeros(S, N, dtype=torch.bool, pin_memory=on_cuda)
    obs, actions, rows = obs_in.numpy(), action_out.numpy(), row_in.numpy()  # the same memory, as the simulator sees it
    losses = {name: torch.zeros(S, device=device) for name in LOSSES}  # sums since the last report
    gradient_step = torch.compile(update) if args.compile else update
    per_step = args.utd_ratio * N  # updates due in an iteration; `owed` are due and not made yet
    block = max((k for k in range(1, 65) if per_step % k == 0), default=1)  # updates per graph

    @torch.no_grad()
    def act() -> None:
        action_out.copy_(agent.exploration_action(obs_in.to(device, non_blocking=True)), non_blocking=True)

    def store() -> None:
        replay.add(row_in.to(device, non_blocking=True), valid_in.to(device, non_blocking=True))

    def learn() -> None:
        for _ in range(block):
            terms = gradient_step(
                agent, critic, agent_target, critic_target, actor_optimizer, critic_optimizer, replay, args
            )
            torch._foreach_add_(list(losses.values()), list(terms.values()))

    act, store, learn = (capture(f, touched | losses, args, device) for f in (act, store, learn))  # on CUDA: graphs
    torch.manual_seed(spaced_seeds(args, 1, 2, step)[0])  # noise and samples of all seeds come from one stream

    next_obs, skip, owed, updates = envs.reset()[0].reshape(S, N, -1), np.zeros((S, N), bool), 0.0, 0
    saved_at = time.perf_counter()
    with catch_signals() as signals:
        while step < last and len(failed) < S and not signals:
            # Act
            obs_in.copy_(torch.from_numpy(next_obs))
            if step < random_until:
                action_out.copy_(agent.random_action(obs_in))
            else:
                act()
            if on_cuda:
                torch.cuda.current_stream(device).synchronize()

            # Learn, utd_ratio updates per step; a GPU goes on with it while the simulator steps
            if step - refill_from >= args.learning_starts:
                owed += per_step
                while owed > block - 1e-6:  # in floating point ten times 0.1 is a little less than 1
                    learn()
                    owed, updates = owed - block, updates + block

            # Step and store; next_obs is the true one, of an episode's last step too
            next_obs, rewards, terminated, truncated, _ = envs.step(as_actions(action_out, action_space))
            next_obs, rewards, terminated = next_obs.reshape(S, N, -1), rewards.reshape(S, N), terminated.reshape(S, N)
            done = terminated | truncated.reshape(S, N)
            # The last transitions have left the pinned memory: the host has waited for the stream since that store.
            np.concatenate([obs, next_obs, actions, rewards[..., None], terminated[..., None]], axis=-1, out=rows)
            valid_in.copy_(torch.from_numpy(~skip))
            store()
            log.count(rewards, done, ~skip)
            skip = done  # the step after the last one of an episode only resets
            step += N

            # Report
            evaluation_due = due(step, N, args.num_evaluations, last)
            if evaluation_due or due(step, N, 100, last):
                means = {name: (total / updates).tolist() for name, total in losses.items()} if updates else {}
                seconds = log.clock()
                episodes = args.final_eval_episodes if step == last else args.eval_episodes
                returns = evaluate(agent, args, episodes, step)["return"].mean(1) if evaluation_due else None
                log.report(step, seconds, means, returns)
                torch._foreach_zero_(list(losses.values()))
                updates = 0
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
