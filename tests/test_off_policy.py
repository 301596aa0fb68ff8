"""DDPG and SAC: the replay, the targets and the gradients, against numbers worked out apart from the scripts."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from test_ppo import WALKER

TORQUE = gymnasium.spaces.Box(-2, 2, (2,))


@pytest.fixture(params=["ddpg", "sac"])
def off_policy(request):
    return load_script(ROOT / "algos" / f"{request.param}.py")


class Counting(gymnasium.Env):
    """Every number tells where it comes from: obs = (environment, episode, step), reward = step. An episode ends after
    2 to 5 steps, by termination where the environment's number is even, else by truncation."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float64)

    def __init__(self, number):
        self.number, self.episode = number, 0

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.number, self.episode, 0.0]), {}

    def step(self, action):
        self.t += 1
        end = self.t == 2 + (self.number + self.episode) % 4
        terminated = end and self.number % 2 == 0
        info = {"x_velocity": float(self.t)}
        return np.array([self.number, self.episode, self.t]), float(self.t), terminated, end and not terminated, info


def counting_envs(args, env_seeds, render_mode=None):
    """A step overwrites the observations that the one before it has returned: keeping them takes a copy."""
    return gymnasium.vector.SyncVectorEnv([lambda i=i: Counting(i) for i in range(len(env_seeds))], copy=False)


@pytest.fixture
def small(tmp_path):
    return {
        "env_id": "Counting", "num_envs": 3, "learning_starts": 30, "batch_size": 8, "hidden_size": 8,
        "num_evaluations": 0, "run_dir": str(tmp_path), "save_replay": True, "device": "cpu",
    }  # fmt: skip


def check_rows(script, rows, seed_number, num_envs):
    """Every stored row is a transition that the task really made, and no reset row is among them."""
    for obs, next_obs, actions, (reward,), (terminated,) in (row.split([3, 3, 1, 1, 1]) for row in rows):
        env, episode, t = obs.int().tolist()
        assert env // num_envs == seed_number
        assert next_obs.int().tolist() == [env, episode, t + 1]  # of the same episode: never the reset observation
        length = 2 + (env + episode) % 4
        assert t < length
        assert reward == t + 1
        assert bool(terminated) == (t + 1 == length and env % 2 == 0)
        assert -2 <= actions.item() <= 2


@pytest.mark.parametrize("buffer_size", [1000, 37])
def test_the_replay_holds_what_happened_and_nothing_else(off_policy, small, monkeypatch, buffer_size):
    """Terminations, truncations, reset rows, several environments and seeds; with 37 places it wraps around."""
    monkeypatch.setattr(off_policy, "make_envs", counting_envs)
    args = off_policy.Args(num_seeds=2, total_timesteps=300, buffer_size=buffer_size, **small)
    folders = off_policy.train(args)
    saved = torch.load(folders[0] / "checkpoint.pt", weights_only=True)["state"]
    for k in range(2):
        count = int(saved["replay.count"][k])
        resets = 0
        for env in range(3 * k, 3 * k + 3):  # counted apart: 100 steps of each environment
            episode, left = 0, 100
            while left > 0:
                episode += 1
                left -= 2 + (env + episode) % 4
                resets += left > 0
                left -= 1
        assert count == 300 - resets
        stored = saved["replay.rows"][k, : min(count, buffer_size)]
        check_rows(off_policy, stored, k, 3)
        keys = {tuple(row[:3].int().tolist()) for row in stored}
        assert len(keys) == len(stored)  # each once
        if buffer_size == 37:  # the newest ones: of the last episodes
            assert min(episode for _, episode, _ in keys) > 15


def test_samples_come_from_the_stored_rows_of_the_own_seed_evenly(off_policy):
    replay = off_policy.Replay(2, 50, 1, 1, torch.device("cpu"))
    replay.rows.fill_(torch.nan)
    for i in range(10):
        rows = torch.zeros(2, 3, 5)
        rows[:, :, 0] = torch.tensor([[100.0], [200.0]]) + i
        replay.add(rows, torch.tensor([[True, i % 2 == 0, False], [True, True, True]]))
    assert replay.count.flatten().tolist() == [15, 30]
    obs = replay.sample(20_000)[0].squeeze(-1)
    for k, base in enumerate((100, 200)):
        values, counts = (obs[k] - base).unique(return_counts=True)
        # no NaN: neither an empty place nor the one for what is no transition
        assert values.tolist() == list(range(10))
        expected = torch.tensor([2.0, 1.0] * 5) / 15 if k == 0 else torch.full((10,), 0.1)
        assert torch.allclose(counts / 20_000, expected, atol=0.01)


def test_seeds_draw_rows_of_their_own(off_policy):
    replay = off_policy.Replay(2, 50, 1, 1, torch.device("cpu"))
    for i in range(10):
        replay.add(torch.full((2, 1, 5), float(i)), torch.ones(2, 1, dtype=torch.bool))
    assert abs(torch.corrcoef(replay.sample(5000)[0].squeeze(-1))[0, 1]) < 0.1


def test_a_full_replay_is_drawn_from_evenly(off_policy):
    replay = off_policy.Replay(1, 7, 1, 1, torch.device("cpu"))
    for i in range(10):
        replay.add(torch.full((1, 1, 5), float(i)), torch.ones(1, 1, dtype=torch.bool))
    values, counts = replay.sample(20_000)[0].unique(return_counts=True)
    assert values.tolist() == list(range(3, 10))
    assert torch.allclose(counts / 20_000, torch.full((7,), 1 / 7), atol=0.01)


def test_termination_stops_the_bootstrap_and_truncation_does_not(off_policy):
    target = off_policy.td_target(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 9.0]]), 0.5
    )
    assert target.tolist() == [[1.0, 6.5]]
    blown_up = off_policy.td_target(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), torch.nan), 0.5)
    assert blown_up.item() == 1  # a state that ended an episode by not being finite


@pytest.mark.parametrize(("low", "high"), [(0, np.inf), (-1.7e308, 1.7e308), (1, 1)])
def test_actions_without_a_finite_range_are_refused(off_policy, capsys, low, high):
    with pytest.raises(SystemExit) as stop:
        off_policy.Agent(WALKER[0], gymnasium.spaces.Box(low, high, (1,), np.float64), off_policy.Args())
    assert stop.value.code == 2
    assert "finite range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_envs", "utd_ratio"),
    [(1, 1.0), (3, 1.0), (8, 1.0), (4, 0.5), (2, 0.25), (3, 0.5), (2, 3.0), (1, 0.1), (3, 1.5), (70, 1.0)],
)
def test_the_number_of_updates_is_exact(off_policy, small, monkeypatch, num_envs, utd_ratio):
    monkeypatch.setattr(off_policy, "make_envs", counting_envs)
    begins, total = (24, 120) if num_envs < 70 else (70, 280)
    args = small | {"num_envs": num_envs, "learning_starts": begins, "total_timesteps": total, "utd_ratio": utd_ratio}
    (folder,) = off_policy.train(off_policy.Args(**args))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert state["critic_adam.0.step"] == state["actor_adam.0.step"] == int((total - begins) * utd_ratio + 1e-9)


def test_actions_are_random_until_learning_starts(off_policy, small, monkeypatch):
    monkeypatch.setattr(off_policy, "make_envs", counting_envs)
    monkeypatch.setattr(
        off_policy.Agent, "exploration_action", lambda self, obs: torch.full((*obs.shape[:2], 1), 0.125)
    )
    (folder,) = off_policy.train(off_policy.Args(total_timesteps=60, **small))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    rows = state["replay.rows"][0, : int(state["replay.count"])]
    chosen = rows[:, 6] == 0.125
    assert not chosen[:20].any()
    assert chosen[-10:].all()
    assert len(rows[~chosen, 6].unique()) == (~chosen).sum()  # every environment and step draws its own


def test_noise_differs_between_environments_and_dimensions(off_policy):
    of_ddpg = {"exploration_noise": 0.2} if off_policy.__name__ == "ddpg" else {}
    agent = off_policy.Agent(WALKER[0], TORQUE, off_policy.Args(num_seeds=2, **of_ddpg))
    torch.manual_seed(0)
    actions = agent.exploration_action(torch.zeros(2, 500, 5))
    assert actions.abs().max() <= 2
    spread = actions.std(dim=1)
    assert (spread > 0.1).all()
    assert abs(torch.corrcoef(actions[0].T)[0, 1]) < 0.2
    assert abs(torch.corrcoef(actions[..., 0])[0, 1]) < 0.2  # of the seeds
    if of_ddpg:  # 0.2 of half the range, around pi(s) = 0
        assert torch.allclose(spread, torch.full((2, 2), 0.4), rtol=0.15)


def parts(script, args, action_space=TORQUE):
    """Networks, optimisers and a filled replay; all that `update` takes."""
    agent = script.Agent(WALKER[0], action_space, args)
    make = script.make_critics if script.__name__ == "sac" else script.make_critic
    critic, critic_target = make(agent, args), make(agent, args).requires_grad_(False)
    with torch.no_grad():
        for module in (agent, critic):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.ones_like(parameter).cumsum(-1).sin())
    S = args.num_seeds
    replay = script.Replay(S, 100, 5, 2, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(1, 60, 14, generator=generator).repeat(S, 1, 1)
    rows[..., -1] = (rows[..., -1] > 1).float()
    replay.add(rows, torch.ones(S, 60, dtype=torch.bool))
    critic_adam = torch.optim.Adam(critic.parameters(), 1e-3, fused=True)
    if script.__name__ == "sac":
        log_alpha = torch.nn.Parameter(torch.zeros(S, 1))
        actor_adam = torch.optim.Adam([*agent.parameters(), log_alpha], 1e-3, fused=True)
        return [agent, critic, critic_target, log_alpha, actor_adam, critic_adam, replay, args]
    agent_target = script.Agent(WALKER[0], action_space, args).requires_grad_(False)
    actor_adam = torch.optim.Adam(agent.parameters(), 1e-3, fused=True)
    return [agent, critic, agent_target, critic_target, actor_adam, critic_adam, replay, args]


def tensors_of(everything, k=None):
    """All parameters, by seed: networks of twin critics have two members a seed."""
    found = []
    for part in everything:
        if isinstance(part, torch.nn.Module):
            found += list(part.parameters())
        elif isinstance(part, torch.nn.Parameter):
            found.append(part)
    seeds = everything[-1].num_seeds
    return [tensor.detach().unflatten(0, (seeds, -1))[slice(None) if k is None else k] for tensor in found]


def frozen_noise(monkeypatch, script, k=None):
    """Let the batches and the noise of seed k alone be those that it has among three."""

    def take(x):
        return x if k is None else x[k : k + 1]

    generator, rand, randn = torch.Generator().manual_seed(0), torch.rand, torch.randn
    monkeypatch.setattr(script.torch, "randn_like", lambda x: take(randn(3, *x.shape[1:], generator=generator)))
    monkeypatch.setattr(script.torch, "rand", lambda _, size, device: take(rand(3, size, generator=generator)))


def test_seeds_together_equal_seeds_alone_and_share_no_nan(off_policy, monkeypatch):
    size = {"hidden_size": 16, "batch_size": 12}
    results = {}
    for name, k, dirt in (("together", None, False), ("dirty", None, True), *((str(k), k, False) for k in range(3))):
        args = off_policy.Args(**size, **({"num_seeds": 3} if k is None else {"seed": 1 + k}))
        everything = parts(off_policy, args)
        if dirt:
            everything[-2].rows[1, :60, 10] = torch.nan
        with monkeypatch.context() as patch:
            frozen_noise(patch, off_policy, k)
            for _ in range(4):
                off_policy.update(*everything)
        results[name] = everything
    together, dirty = results["together"], results["dirty"]
    assert off_policy.diverged(together[0]) == []
    assert off_policy.diverged(dirty[0]) == [1]
    for k in range(3):
        for ours, alone in zip(tensors_of(together, k), tensors_of(results[str(k)], 0), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-5)
    for k in (0, 2):
        for ours, theirs in zip(tensors_of(together, k), tensors_of(dirty, k), strict=True):
            assert torch.equal(ours, theirs)


def test_polyak_average_by_hand(off_policy):
    everything = parts(off_policy, off_policy.Args(tau=0.25, hidden_size=4))
    nets = [part for part in everything if isinstance(part, torch.nn.Module)]
    pairs = [(nets[1], nets[2])] if off_policy.__name__ == "sac" else [(nets[0], nets[2]), (nets[1], nets[3])]
    before = [[p.clone() for p in average.parameters()] for _, average in pairs]
    off_policy.update(*everything)
    for (new, average), old in zip(pairs, before, strict=True):
        for a, b, c in zip(average.parameters(), old, new.parameters(), strict=True):
            assert torch.allclose(a, 0.75 * b + 0.25 * c, atol=1e-6)
            assert not torch.equal(a, b)


def forward(network, x):
    """The network of one seed and member by plain matrix products: layers of ReLU, the last one linear."""
    weights, biases = list(network.parameters())[0::2], list(network.parameters())[1::2]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight[0] + bias[0]
        x = x.relu() if i + 1 < len(weights) else x
    return x


def test_ddpg_losses_by_hand(ddpg):
    args = ddpg.Args(hidden_size=4, batch_size=7, gamma=0.9)
    agent, critic, agent_target, critic_target, *_, replay, _ = everything = parts(ddpg, args)
    torch.manual_seed(3)
    obs, next_obs, actions, rewards, terminated = (x[0] for x in replay.sample(7))
    with torch.no_grad():
        next_actions = 2 * forward(agent_target.actor, next_obs).tanh()
        next_q = forward(critic_target, torch.cat([next_obs, next_actions], 1)).flatten()
        y = rewards + 0.9 * (1 - terminated) * next_q
        q = forward(critic, torch.cat([obs, actions], 1)).flatten()
        loss = (q - y).square().mean()
        own_actions = 2 * forward(agent.actor, obs).tanh()
    torch.manual_seed(3)
    losses = ddpg.update(*everything)
    assert losses["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert losses["q_values"].item() == pytest.approx(q.mean().item(), rel=1e-4)
    with torch.no_grad():  # of the critic after its step, of the actor before its own
        actor_loss = -forward(critic, torch.cat([obs, own_actions], 1)).mean()
    assert losses["actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-4)


def test_ddpg_actor_gradient_against_finite_differences(ddpg):
    args = ddpg.Args(hidden_size=4, batch_size=7)
    *networks, _, _, replay, _ = parts(ddpg, args)
    agent, critic, *_ = (network.double() for network in networks)
    replay.rows = replay.rows.double()
    torch.manual_seed(0)
    obs = replay.sample(7)[0]
    start, parameter = [tensor.clone() for tensor in agent.state_dict().values()], agent.actor[2].weight
    before = parameter.detach().clone()
    torch.manual_seed(0)  # the same rows
    climbs, stands = torch.optim.SGD(agent.parameters(), 1.0), torch.optim.SGD(critic.parameters(), 0.0)
    ddpg.update(*networks, climbs, stands, replay, args)
    gradient = parameter.detach() - before
    agent.load_state_dict(dict(zip(agent.state_dict(), start, strict=True)))

    def objective():
        return ddpg.q_value(critic, obs, agent.deterministic_action(obs)).mean()

    for i in range(0, parameter.numel(), 3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * 1e-6
                values.append(objective().item())
                parameter.view(-1)[i] -= sign * 1e-6
        assert gradient.flatten()[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-7)


def test_ddpg_update_raises_q_of_its_actions(ddpg):
    everything = parts(ddpg, ddpg.Args(hidden_size=16, batch_size=60))
    agent, critic, replay = everything[0], everything[1], everything[-2]
    for group in everything[5].param_groups:
        group["lr"] = 0.0  # the critic stands still
    obs = replay.rows[:, :60, :5]
    before = ddpg.q_value(critic, obs, agent.deterministic_action(obs)).mean().item()
    for _ in range(20):
        ddpg.update(*everything)
    assert ddpg.q_value(critic, obs, agent.deterministic_action(obs)).mean().item() > before


def test_twins_are_not_the_same_network(sac):
    args = sac.Args(num_seeds=2)
    critics = sac.make_critics(sac.Agent(*WALKER, args), args)
    q = sac.q_values(critics, torch.ones(2, 1, 5), torch.ones(2, 1, 2)).flatten()
    assert len(q.unique()) == 4  # nor are those of two seeds


def test_sac_losses_by_hand(sac):
    args = sac.Args(hidden_size=4, batch_size=7, gamma=0.9)
    everything = parts(sac, args)
    agent, critics, targets, log_alpha, *_, replay, _ = everything
    with torch.no_grad():
        log_alpha.fill_(np.log(0.3))
    torch.manual_seed(3)
    obs, next_obs, actions, rewards, terminated = replay.sample(7)
    with torch.no_grad():
        next_actions, next_log_probs = agent.sample(next_obs)
        own_actions, log_probs = agent.sample(obs)

    def both(network, *rows):
        """Q by each of the twins, by plain matrix products."""
        values = []
        for j in range(2):
            x, tensors = torch.cat(rows, -1)[0], [p.detach()[j] for p in network.parameters()]
            for i in range(0, len(tensors), 2):
                x = x @ tensors[i] + tensors[i + 1]
                x = x.relu() if i + 2 < len(tensors) else x
            values.append(x.flatten())
        return values

    in_units = next_log_probs[0] + agent.action_scale.log().sum()  # of half the range, which TORQUE does not have
    next_values = torch.minimum(*both(targets, next_obs, next_actions)) - 0.3 * in_units
    y = rewards[0] + 0.9 * (1 - terminated[0]) * next_values
    q_values = both(critics, obs, actions)
    critic_loss = sum((q - y).square().mean() for q in q_values)
    torch.manual_seed(3)
    losses = sac.update(*everything)
    assert losses["critic_loss"].item() == pytest.approx(critic_loss.item(), rel=1e-4)
    assert losses["q_values"].item() == pytest.approx(torch.stack(q_values).mean().item(), rel=1e-4)
    assert losses["alpha"].item() == pytest.approx(0.3)
    # of the critics after their step, of the actor before its own
    actor_loss = (0.3 * log_probs[0] - torch.minimum(*both(critics, obs, own_actions))).mean()
    assert losses["actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-4)
    assert losses["entropy"].item() == pytest.approx(-log_probs.mean().item(), rel=1e-4)
    missing = log_probs.mean() + agent.action_scale.log().sum() - 2  # the target entropy is -1 a dimension, in units
    assert log_alpha.grad.item() == pytest.approx(-0.3 * missing.item(), rel=1e-3)


def test_sac_actor_follows_q_and_its_own_entropy(sac):
    """The actor's gradient, against the density by torch's own normal and the change of variables."""
    args = sac.Args(hidden_size=4, batch_size=7)
    everything = parts(sac, args)
    agent, critics, _, log_alpha, *_, replay, _ = everything
    log_alpha.data.fill_(np.log(0.3))
    before = copy.deepcopy(agent)
    torch.manual_seed(3)
    obs, next_obs, *_ = replay.sample(7)
    agent.sample(next_obs)
    noise = torch.randn(1, 7, agent.action_dim)
    torch.manual_seed(3)
    sac.update(*everything)
    mean, log_std = before.policy(obs)
    normal = torch.distributions.Normal(mean, log_std.exp())
    pre_tanh = mean + log_std.exp() * noise
    log_slope = torch.log(agent.action_scale * (1 - pre_tanh.tanh().square()))
    log_probs = (normal.log_prob(pre_tanh) - log_slope).sum(-1)
    actions = pre_tanh.tanh() * agent.action_scale + agent.action_bias
    q = sac.q_values(critics, obs, actions).amin(1)  # of the critics after their step
    wanted = torch.autograd.grad((0.3 * log_probs - q).mean(), list(before.actor.parameters()))
    for parameter, gradient in zip(agent.actor.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sac_density_integrates_to_one(sac, scale):
    """The density of scale * tanh(u), summed over a fine grid of actions."""
    mean, log_std = torch.tensor([[[0.7]]]).double(), torch.tensor([[[-0.3]]]).double()
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    actions = (edges[1:] + edges[:-1]) / 2
    pre_tanh = actions.atanh().view(1, -1, 1)
    noise = (pre_tanh - mean) / log_std.exp()
    log_probs = sac.squashed_log_prob(noise, log_std, pre_tanh, torch.tensor([scale]).double())
    assert (log_probs.exp().sum() * scale * 2 / 400_000).item() == pytest.approx(1, abs=1e-4)


def test_sac_log_prob_against_the_change_of_variables_at_saturation(sac):
    normal = torch.distributions.Normal(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    transforms = [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(1.0, 3.0)]
    squashed = torch.distributions.TransformedDistribution(normal, transforms)
    for u in (-3.0, -0.1, 0.0, 1.0, 8.0):
        x = torch.tensor(u).double()
        expected = squashed.log_prob(1 + 3 * x.tanh())
        noise, log_std = ((x - 0.5) / 2).view(1, 1, 1), torch.tensor([[[np.log(2.0)]]]).double()
        ours = sac.squashed_log_prob(noise, log_std, x.view(1, 1, 1), torch.tensor([3.0]).double())
        assert ours.item() == pytest.approx(expected.item(), abs=1e-4), u
    # where tanh(u) is 1 to the last digit, the density still falls by exp(-2 u): log(1 - tanh^2) = 2 log 2 - 2 u
    u = torch.tensor([20.0, 40.0]).view(1, 2, 1)
    log_probs = sac.squashed_log_prob(torch.zeros(1, 2, 1), torch.zeros(1, 1, 1), u, torch.ones(1))[0]
    assert (log_probs[1] - log_probs[0]).item() == pytest.approx(40, rel=1e-5)


def test_sac_draws_actions_with_the_density_that_it_says(sac):
    """The density, by torch's own distributions, of the actions drawn; bounds that are neither 1 nor symmetric."""
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([3.0, 0.75])
    agent = sac.Agent(WALKER[0], gymnasium.spaces.Box(low.numpy(), high.numpy()), sac.Args())
    obs = torch.randn(1, 1000, 5)
    actions, log_probs = agent.sample(obs)
    assert (actions > low).all()
    assert (actions < high).all()
    mean, log_std = agent.policy(obs)
    squash = torch.distributions.AffineTransform((high + low) / 2, (high - low) / 2)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform(), squash])
    torch.testing.assert_close(log_probs, expected.log_prob(actions).sum(-1), rtol=1e-3, atol=1e-3)


def test_sac_log_std_is_bounded(sac):
    agent = sac.Agent(WALKER[0], TORQUE, sac.Args())
    with torch.no_grad():
        for bias, bound in ((-1e9, -5.0), (1e9, 2.0)):
            agent.actor[-1].bias.fill_(bias)
            assert agent.policy(torch.zeros(1, 1, 5))[1].unique().item() == bound


def test_alpha_rises_where_entropy_is_below_its_target(sac):
    log_alpha = torch.zeros(2, 1, requires_grad=True)
    log_probs = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])  # entropies -5 and 5, for a target of -2
    sac.alpha_loss(log_alpha, log_probs, torch.tensor(-2.0)).sum().backward()
    assert log_alpha.grad.flatten().tolist() == [-3.0, 7.0]  # a step against it raises the first and lowers the second


def test_what_entropy_is_worth_does_not_depend_on_the_unit_of_the_actions(sac, monkeypatch):
    """Critics that see no action: then the same draws give the same targets y, whatever the unit."""
    q_values, losses = sac.q_values, []
    monkeypatch.setattr(sac, "q_values", lambda critics, obs, actions: q_values(critics, obs, 0 * actions))
    for scale in (0.4, 1.0, 3.0):
        everything = parts(sac, sac.Args(), gymnasium.spaces.Box(-scale, scale, (2,)))
        torch.manual_seed(0)
        losses.append(sac.update(*everything)["critic_loss"].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_alpha_does_not_depend_on_the_unit_of_the_actions(sac, scale):
    """A policy that has its target entropy has it in every unit, and alpha's loss is flat there."""
    agent = sac.Agent(WALKER[0], gymnasium.spaces.Box(-scale, scale, (2,)), sac.Args())
    log_alpha = torch.zeros(1, 1, requires_grad=True)
    torch.manual_seed(0)
    log_probs = agent.sample(torch.randn(1, 50_000, 5))[1].detach()
    sac.alpha_loss(log_alpha, log_probs, agent.target_entropy).sum().backward()
    in_units = -(log_probs + 2 * np.log(scale)).mean()  # entropy of actions in units of half their range
    assert log_alpha.grad.item() == pytest.approx(in_units.item() + 2, rel=1e-4)
    assert in_units.item() == pytest.approx(-0.25, abs=0.1)  # whatever the scale


def test_a_fixed_alpha_stays_and_another_is_learned(sac, small, monkeypatch):
    monkeypatch.setattr(sac, "make_envs", counting_envs)
    (folder,) = sac.train(sac.Args(total_timesteps=120, alpha=0.2, **small))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert state["log_alpha"].exp().item() == pytest.approx(0.2)
    (folder,) = sac.train(sac.Args(total_timesteps=120, **small | {"seed": 2}))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert abs(state["log_alpha"].item()) > 1e-3


def test_resuming_with_and_without_the_replay(off_policy, small, monkeypatch, capsys):
    monkeypatch.setattr(off_policy, "make_envs", counting_envs)
    for save_replay in (True, False):
        args = small | {"save_replay": save_replay, "seed": 1 + save_replay}
        (folder,) = off_policy.train(off_policy.Args(total_timesteps=120, **args))
        before = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
        assert ("replay.rows" in before) == save_replay
        networks = {"sac": {"critics", "targets"}, "ddpg": {"critic", "critic_target", "agent_target"}}
        assert networks[off_policy.__name__] <= {name.partition(".")[0] for name in before}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(off_policy.Agent, "random_action", None)  # a policy that is trained fills it itself
            off_policy.train(off_policy.Args(total_timesteps=240, resume=str(folder), **args))
        after = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
        made = int(after["critic_adam.0.step"] - before["critic_adam.0.step"])
        assert made == (120 if save_replay else 120 - 30)
        assert ("30 of the 120 steps left refill the replay" in capsys.readouterr().out) == (not save_replay)
        if save_replay:
            assert (after["replay.count"] > before["replay.count"]).all()
            check_rows(off_policy, after["replay.rows"][0, : int(before["replay.count"])], 0, 3)


@pytest.mark.parametrize("step", [15, 39])  # 39: after a run that was cut off as it refilled the replay
def test_resuming_before_anything_was_learned_acts_randomly_until_it_is(off_policy, small, monkeypatch, step):
    monkeypatch.setattr(off_policy, "make_envs", counting_envs)
    policy = off_policy.Agent.exploration_action
    used = []  # rows of each call

    def exploration_action(agent, obs):
        used.append(obs.shape[1])
        return policy(agent, obs)

    monkeypatch.setattr(off_policy.Agent, "exploration_action", exploration_action)
    monkeypatch.setattr(off_policy, "capture", lambda function, *rest: function)  # which would call it to warm up
    args = small | {"save_replay": False, "num_evaluations": 0, "final_eval_episodes": 1}
    (folder,) = off_policy.train(off_policy.Args(total_timesteps=60, **args))
    used.clear()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["global_step"] = step
    for name, tensor in saved["state"].items():
        if name.endswith(".step"):
            tensor.zero_()
    torch.save(saved, folder / "checkpoint.pt")
    off_policy.train(off_policy.Args(total_timesteps=120, resume=str(folder), **args))
    assert used.count(3) == (120 - step - 30) // 3  # in a step of 3 environments; batches have 8 rows


@pytest.mark.parametrize(("total", "enough"), [(30, False), (32, False), (33, True)])
def test_a_run_that_would_learn_nothing_is_refused(off_policy, small, total, enough, capsys):
    if enough:
        off_policy.Args(total_timesteps=total, **small)
        return
    for arguments in ({"total_timesteps": total}, {"total_timesteps": 100, "utd_ratio": 0.0}):
        with pytest.raises(SystemExit) as stop:
            off_policy.Args(**arguments, **small)
        assert stop.value.code == 2
        assert "nothing is learned" in capsys.readouterr().err


def test_the_steps_that_learn_begin_with_an_iteration(off_policy, small, capsys):
    """Of 32 steps in 8 environments those from 16 on, 10 being random: 0.8 updates are none; 0.05 * 22 would be one."""
    small |= {"num_envs": 8, "learning_starts": 10, "utd_ratio": 0.05}
    off_policy.Args(total_timesteps=40, **small)
    with pytest.raises(SystemExit):
        off_policy.Args(total_timesteps=32, **small)
    assert "total_timesteps leaves 16 steps" in capsys.readouterr().err


def test_a_replay_too_small_for_a_step_is_refused(off_policy, capsys):
    with pytest.raises(SystemExit) as stop:
        off_policy.Args(num_envs=20, buffer_size=10)
    assert stop.value.code == 2
    assert "20 environments" in capsys.readouterr().err
    off_policy.Args(buffer_size=2**24)
    with pytest.raises(SystemExit):  # rows that a float32 cannot name
        off_policy.Args(buffer_size=2**24 + 1)


def test_moments_of_a_dead_weight_decay_to_zero(off_policy):
    """Without flushing they would stay at the smallest numbers that there are, at which a CPU is slow."""
    off_policy.select_device(off_policy.Args(device="cpu"))
    weight = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(4)
    adam.step()
    weight.grad.zero_()
    for _ in range(1000):
        adam.step()
    assert not adam.state[weight]["exp_avg"].any()
