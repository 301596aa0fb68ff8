"""REINFORCE: what the lectures claim of its estimators, computed exactly on a task small enough to list."""

import itertools
import json
import sys

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from test_ppo import WALKER, episode_flags, random_rollout
from test_runs import Reach, read_metrics

GAMMA, HORIZON = 0.8, 3
NEXT = {(0, 0): 1, (0, 1): 2, (1, 0): 2, (1, 1): 0, (2, 0): 0, (2, 1): 3}  # state 3 ends the episode
REWARD = {(0, 0): 1.0, (0, 1): 0.5, (1, 0): 5.3, (1, 1): 6.0, (2, 0): -4.0, (2, 1): -3.0}


def all_episodes():
    """Every episode of the task as a list of (state, action), without repetition."""
    episodes = set()
    for actions in itertools.product((0, 1), repeat=HORIZON):
        state, episode = 0, []
        for action in actions:
            episode.append((state, action))
            state = NEXT[state, action]
            if state == 3:
                break
        episodes.add(tuple(episode))
    return sorted(episodes)


def tabular(reinforce, **arguments):
    """An agent, and a rollout that holds every episode once, environment by environment."""
    episodes = all_episodes()
    N = len(episodes)
    args = reinforce.Args(num_envs=N, horizon=HORIZON, num_steps=HORIZON, gamma=GAMMA, hidden_size=4, **arguments)
    space = gymnasium.spaces.Box(-1, 1, (3,))
    agent = reinforce.Agent(space, gymnasium.spaces.Discrete(2), args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.arange(parameter.numel()).reshape(parameter.shape).sin())
    agent.return_stats.count.fill_(1e15)  # rewards as they are
    rollout = {name: torch.zeros(HORIZON, 1, N, dtype=torch.bool) for name in ("terminated", "done", "valid")}
    rollout |= {name: torch.zeros(HORIZON, 1, N).double() for name in ("rewards", "age")}
    rollout |= {"obs": torch.zeros(HORIZON + 1, 1, N, 3).double(), "actions": torch.zeros(HORIZON, 1, N, 1).double()}
    for n, episode in enumerate(episodes):
        for t, (state, action) in enumerate(episode):
            rollout["obs"][t, 0, n, state] = 1
            rollout["actions"][t, 0, n] = action
            rollout["rewards"][t, 0, n] = REWARD[state, action]
            rollout["valid"][t, 0, n] = True
            rollout["age"][t, 0, n] = t
        rollout["done"][t, 0, n] = rollout["terminated"][t, 0, n] = True
    return agent, rollout, args


def objective(agent):
    """J, summed over all episodes, and the probability of each."""
    probabilities = agent.policy(torch.eye(3).double()[None])[0].softmax(-1)[0]
    total, weights = 0.0, []
    for episode in all_episodes():
        probability = torch.stack([probabilities[state, action] for state, action in episode]).prod()
        total = total + probability * sum(GAMMA**t * REWARD[pair] for t, pair in enumerate(episode))
        weights.append(probability)
    return total, torch.stack(weights).detach()


def estimates(reinforce, agent, rollout, args, average=0.0):
    """The gradient's estimate from each episode alone, [N, P], as if it had been the whole batch."""
    average = torch.tensor([[average, 1.0]]).double()
    batch = reinforce.compute_targets(agent, rollout, torch.zeros(1, args.num_envs).double(), average, args)
    rows = []
    for n in range(args.num_envs):
        log_probs = reinforce.log_prob(batch["actions"], agent.policy(batch["obs"]))
        mine = torch.arange(batch["weights"].shape[1]) % args.num_envs == n
        loss = reinforce.policy_loss(log_probs, batch["weights"] * mine, batch["valid"]) * batch["weights"].shape[1]
        gradient = torch.autograd.grad(-loss.sum(), list(agent.actor.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


ESTIMATORS = {
    "R(tau)": {"baseline": "none", "reward_to_go": False},
    "R(tau), whose rewards are discounted already": {
        "baseline": "none",
        "reward_to_go": False,
        "discount_visitation": True,
    },
    "reward-to-go": {"baseline": "none", "discount_visitation": True},
    "moving average": {"baseline": "mean", "discount_visitation": True},
    "value": {"baseline": "value", "discount_visitation": True},
}


def fit_value(agent, probabilities):
    """Let the critic be V of the policy, state by state: its expected return-to-go over all visits."""
    with torch.no_grad():
        weight, value = torch.zeros(3).double(), torch.zeros(3).double()
        for probability, episode in zip(probabilities, all_episodes(), strict=True):
            for t, (state, _) in enumerate(episode):
                to_go = sum(GAMMA**i * REWARD[pair] for i, pair in enumerate(episode[t:]))
                weight[state] += probability
                value[state] += probability * to_go
        value /= weight
    optimizer = torch.optim.Adam(agent.critic.parameters(), 0.05)
    for _ in range(800):
        loss = (agent.critic(torch.eye(3).double()[None]).flatten() - value).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_all_estimators_agree_in_expectation_and_the_variance_falls(reinforce):
    variances = {}
    for name, arguments in ESTIMATORS.items():
        agent, rollout, args = tabular(reinforce, **arguments)
        total, probabilities = objective(agent)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(agent.actor.parameters()))])
        fit_value(agent, probabilities)
        rows = estimates(reinforce, agent, rollout, args, average=total.item())
        mean = (probabilities[:, None] * rows).sum(0)
        torch.testing.assert_close(mean, exact, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        variances[name] = (probabilities[:, None] * (rows - mean).square()).sum().item()
    order = list(variances.values())
    assert order == sorted(order, reverse=True), variances
    assert order[-1] < 0.7 * order[0]


def test_the_exact_gradient_is_that_of_finite_differences(reinforce):
    agent, rollout, args = tabular(reinforce, baseline="none", discount_visitation=True)
    _, probabilities = objective(agent)
    mean = (probabilities[:, None] * estimates(reinforce, agent, rollout, args)).sum(0)
    parameters, at = list(agent.actor.parameters()), 0
    for parameter in parameters:
        for i in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * 1e-5
                    values.append(objective(agent)[0].item())
                    parameter.view(-1)[i] -= sign * 1e-5
            assert mean[at].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)
            at += 1


def test_without_the_discount_it_is_another_direction(reinforce):
    """Practice drops gamma^t; here one sees that the gradient is then not that of J."""
    agent, rollout, args = tabular(reinforce, baseline="none")
    total, probabilities = objective(agent)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(agent.actor.parameters()))])
    mean = (probabilities[:, None] * estimates(reinforce, agent, rollout, args)).sum(0)
    assert (mean - exact).norm() > 0.05 * exact.norm()


def test_discounted_visitation_is_roll_in_and_roll_out(reinforce):
    """grad J = 1 / (1 - gamma) E[grad log pi(a|s) Q(s, a)], (s, a) where a walk that stops with 1 - gamma ends."""
    agent, rollout, args = tabular(reinforce, baseline="none", discount_visitation=True)
    _, probabilities = objective(agent)
    mean = (probabilities[:, None] * estimates(reinforce, agent, rollout, args)).sum(0)
    log_probs = agent.policy(torch.eye(3).double()[None])[0].log_softmax(-1)[0]
    parameters = list(agent.actor.parameters())

    def q(state, action, t):
        following = NEXT[state, action]
        value = 0.0
        if following != 3 and t + 1 < HORIZON:
            value = sum(log_probs[following, a].exp().item() * q(following, a, t + 1) for a in (0, 1))
        return REWARD[state, action] + GAMMA * value

    total, here = 0.0, {0: 1.0}  # the walk's distribution over states at step t
    for t in range(HORIZON):
        after = {}
        for (state, mass), action in itertools.product(here.items(), (0, 1)):
            probability = mass * log_probs[state, action].exp().item()
            stops_here = (1 - GAMMA) * GAMMA**t * probability
            gradient = torch.autograd.grad(log_probs[state, action], parameters, retain_graph=True)
            total = total + stops_here * q(state, action, t) * torch.cat([g.flatten() for g in gradient])
            if NEXT[state, action] != 3:
                after[NEXT[state, action]] = after.get(NEXT[state, action], 0.0) + probability
        here = after
    torch.testing.assert_close(mean, total / (1 - GAMMA), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_baseline_leaves_the_expectation(reinforce, discrete):
    """E[grad log pi b] = 0, by summing over all actions, or by a fine grid of them."""
    if discrete:
        logits = torch.tensor([[[0.3, -1.0, 2.0]]], dtype=torch.float64, requires_grad=True)
        log_probs = reinforce.log_prob(torch.arange(3.0).view(1, 3, 1), (logits.expand(1, 3, 3),))
        weights, parameters = log_probs.detach().exp(), [logits]
    else:
        mean, log_std = (torch.tensor([[[x]]], dtype=torch.float64, requires_grad=True) for x in (0.4, -0.7))
        grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64).view(1, -1, 1)
        log_probs = reinforce.log_prob(grid, (mean.expand(1, 20_001, 1), log_std))
        weights, parameters = log_probs.detach().exp() * 16 / 20_000, [mean, log_std]
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    for gradient in torch.autograd.grad((weights * log_probs * 7.0).sum(), parameters):
        assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-6)


def test_reward_to_go_by_a_slow_loop(reinforce):
    rng = np.random.default_rng(0)
    terminated, done, valid = episode_flags(rng, 9, (2, 5), 0.25)
    rewards, next_values = rng.normal(size=(9, 2, 5)), rng.normal(size=(9, 2, 5))
    returns = reinforce.reward_to_go(*(torch.tensor(x) for x in (rewards, next_values, terminated, done)), 0.9)
    for t, s, n in np.argwhere(valid):
        expected, discount = 0.0, 1.0
        for later in range(t, 9):
            expected += discount * rewards[later, s, n]
            discount *= 0.9
            if done[later, s, n] or later == 8:
                expected += 0.0 if terminated[later, s, n] else discount * next_values[later, s, n]
                break
        assert returns[t, s, n].item() == pytest.approx(expected)


def test_with_the_value_baseline_it_is_a2c_with_lambda_1(reinforce, a2c):
    args = reinforce.Args(num_seeds=2, num_envs=3, num_steps=6)
    rollout = random_rollout(reinforce, args, seed=3)
    values = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    flags = rollout["terminated"], rollout["done"]
    weights = reinforce.reward_to_go(rollout["rewards"], values[1:], *flags, 0.9) - values[:-1]
    advantages = a2c.compute_gae(rollout["rewards"], values, *flags, 0.9, 1.0)
    assert torch.allclose(weights[rollout["valid"]], advantages[rollout["valid"]], atol=1e-5)


class Steps(gymnasium.Env):
    """An episode of 3 to 9 steps; the observation is the number of the episode and of the step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, number):
        self.number, self.episode = number, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.t += 1
        return np.array([self.episode, self.t]), 1.0, self.t == 3 + (self.number + self.episode) % 7, False, {}


def test_each_environment_contributes_its_first_episode_and_nothing_after(reinforce, quick, monkeypatch):
    seen = []

    def spy(agent, optimizer, rollout, carry, average, args):
        seen.append({name: tensor.clone() for name, tensor in rollout.items()})
        return {name: torch.zeros(1) for name in reinforce.LOSSES}

    def make_envs(args, env_seeds, render_mode=None):
        return gymnasium.vector.SyncVectorEnv([lambda i=i: Steps(i) for i in range(len(env_seeds))])

    monkeypatch.setattr(reinforce, "update", spy)
    monkeypatch.setattr(reinforce, "make_envs", make_envs)
    small = quick | {"env_id": "Steps", "num_envs": 5, "horizon": 8, "total_timesteps": 400, "num_evaluations": 0}
    (folder,) = reinforce.train(reinforce.Args(baseline="none", **small))
    assert len(seen) >= 10
    steps = 0
    for rollout in seen:
        valid, done, obs = (rollout[name][:, 0] for name in ("valid", "done", "obs"))
        lengths = valid.sum(0)
        steps += 5 * int(lengths.max())
        for n, length in enumerate(lengths.tolist()):
            assert valid[:length, n].all()  # one piece, from the first row on
            assert obs[:length, n, 1].tolist() == list(range(length))
            assert len(set(obs[:length, n, 0].tolist())) == 1  # one episode
            assert done[:, n].sum() == (1 if length < 8 or done[7, n] else 0)
            assert rollout["age"][:length, 0, n].tolist() == list(range(length))
    assert int(read_metrics(folder)[-1]["global_step"]) == steps <= 400  # slots that wait for the last one count


def test_the_moving_average_is_older_than_the_batch(reinforce):
    agent, rollout, args = tabular(reinforce, baseline="mean")
    carry, average = torch.zeros(1, args.num_envs).double(), torch.zeros(1, 2).double()
    first = reinforce.compute_targets(agent, rollout, carry, average, args)
    valid = first["valid"]
    assert torch.equal(first["weights"][valid], first["returns"][valid])  # nothing is known yet
    batch_mean = first["returns"][valid].mean()
    second = reinforce.compute_targets(agent, rollout, carry, average, args)
    assert torch.allclose(second["weights"][valid], (second["returns"] - batch_mean)[valid])
    rollout["rewards"] *= 0.5
    for _ in range(2):
        last = reinforce.compute_targets(agent, rollout, carry, average, args)
    baseline = batch_mean * (0.81 + 0.9 + 0.5) / (0.81 + 0.9 + 1)  # the sums of 0.9^i m_i and of 0.9^i
    assert torch.allclose(last["weights"][valid], (last["returns"] - baseline)[valid])


def test_whole_episodes_end_with_the_last_evaluation_and_the_film(reinforce, quick, monkeypatch):
    """Where another batch might not fit, which is hardly ever total_timesteps."""
    sizes, evaluate, films = [], reinforce.evaluate, []

    def watched(agent, args, num_episodes, step):
        sizes.append((num_episodes, step))
        return evaluate(agent, args, num_episodes, step)

    monkeypatch.setattr(reinforce, "evaluate", watched)
    monkeypatch.setattr(reinforce, "capture_video", lambda *parts: films.append(parts[2]))
    changes = {"env_id": "Hopper-v4", "baseline": "none", "final_eval_episodes": 5, "capture_video": "gif"}
    args = reinforce.Args(**quick | changes)
    (folder,) = reinforce.train(args)
    last = int(read_metrics(folder)[-1]["global_step"])
    assert last < args.total_timesteps
    assert [episodes for episodes, _ in sizes] == [2, 5]
    assert sizes[-1][1] == last
    assert films == [last]


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_seeds_together_equal_seeds_alone_and_share_no_nan(reinforce, baseline):
    size = {"num_envs": 4, "num_steps": 8, "horizon": 8, "baseline": baseline}
    together = reinforce.Args(num_seeds=3, **size)

    def learn(args, rollouts):
        agent = reinforce.Agent(*WALKER, args)
        optimizer = torch.optim.Adam(agent.parameters(), torch.tensor(1e-3), fused=True)
        carry, average = torch.zeros(args.num_seeds, 4), torch.zeros(args.num_seeds, 2)
        for rollout in rollouts:
            reinforce.update(agent, optimizer, rollout, carry, average, args)
        return agent

    rollouts = [random_rollout(reinforce, together, seed) for seed in range(4)]
    rollouts = [rollout | {"age": torch.zeros(8, 3, 4)} for rollout in rollouts]
    for rollout in rollouts:  # what an episode ended on is the reset row's observation, and need not be finite
        rollout["obs"][1:][rollout["terminated"]] = torch.nan
    dirty = [{name: x.clone() for name, x in rollout.items()} for rollout in rollouts]
    dirty[1]["rewards"][:, 1] = torch.nan
    agent, dirty_agent = learn(together, rollouts), learn(together, dirty)
    assert reinforce.diverged(agent) == []
    assert reinforce.diverged(dirty_agent) == [1]
    for k in range(3):
        alone = learn(
            reinforce.Args(seed=1 + k, **size), [{n: x[:, k : k + 1] for n, x in r.items()} for r in rollouts]
        )
        for name, ours in agent.state_dict().items():
            torch.testing.assert_close(ours[k : k + 1], alone.state_dict()[name], rtol=1e-3, atol=2e-5)
            if k != 1:
                assert torch.equal(ours[k], dirty_agent.state_dict()[name][k])


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_a_value_function_that_is_not_used_does_not_touch_the_policys_step(reinforce, baseline):
    """The gradient is clipped to a norm: a critic with large errors must not take its share of it."""
    steps = []
    for scale in (1.0, 1000.0):
        agent, rollout, args = tabular(reinforce, baseline=baseline, max_grad_norm=0.01)
        with torch.no_grad():
            agent.critic[-1].bias.add_(scale)
        before = [parameter.clone() for parameter in agent.actor.parameters()]
        optimizer = torch.optim.SGD(agent.parameters(), 1.0)
        average = torch.zeros(1, 2).double()
        reinforce.update(agent, optimizer, rollout, torch.zeros(1, args.num_envs).double(), average, args)
        steps.append([new - old for new, old in zip(agent.actor.parameters(), before, strict=True)])
    norm = sum(step.square().sum() for step in steps[0]).sqrt().item()
    assert norm == pytest.approx(0.01, rel=1e-4)
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_entropy_bonus_does_not_depend_on_the_length_of_episodes(reinforce):
    """Without rewards the gradient is the bonus's. Rows behind the episodes' ends halve it, as they do the policy's."""
    norms = []
    for padding in (0, HORIZON):
        agent, rollout, args = tabular(reinforce, baseline="none", ent_coef=1.0)
        args.horizon += padding
        for name, x in rollout.items():
            rollout[name] = torch.cat([x, torch.zeros(padding, *x.shape[1:], dtype=x.dtype)])
        rollout["rewards"].zero_()
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
        average = torch.zeros(1, 2).double()
        terms = reinforce.update(agent, optimizer, rollout, torch.zeros(1, args.num_envs).double(), average, args)
        norms.append(terms["grad_norm"].item())
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0] / 2)


def test_variances_of_the_estimators_are_measured(tmp_path):
    """A short measurement: four estimates of one gradient, the noisier the less is subtracted."""
    sys.path.append(str(ROOT / "benchmarks"))
    variance = load_script(ROOT / "benchmarks" / "variance.py")
    places = {"run_dir": tmp_path / "runs", "results": tmp_path / "variance.json"}
    variance.main(variance.Args(train_steps=12_288, batches=40, num_envs=8, **places))
    found = json.loads((tmp_path / "variance.json").read_text())["estimators"]
    variances = [numbers["variance"] for numbers in found.values()]
    assert variances == sorted(variances, reverse=True)
    assert variances[0] > 5 * variances[3]
    for numbers in list(found.values())[:-1]:
        assert numbers["distance_of_means"] < 3 * numbers["standard_error_of_distance"]
        # a difference spreads by no more than both together
        both = numbers["variance"] ** 0.5 + variances[-1] ** 0.5
        assert numbers["standard_error_of_distance"] * 40**0.5 <= both


def test_episodes_that_the_horizon_cuts_count_in_the_statistics(reinforce, quick, monkeypatch):
    """Within 5 steps no pole falls: without them the mean of the last 100 episodes would stay empty."""
    compute, carried = reinforce.compute_targets, []

    def watched(agent, rollout, carry, *rest):
        carried.append(carry.abs().sum().item())
        return compute(agent, rollout, carry, *rest)

    monkeypatch.setattr(reinforce, "compute_targets", watched)
    args = reinforce.Args(**quick | {"env_id": "CartPole-v1", "baseline": "mean", "horizon": 5})
    (folder,) = reinforce.train(args)
    assert set(carried) == {0.0}  # nor do rewards of a batch go on in the next one's discounted sums
    assert {float(row["episodic_return"]) for row in read_metrics(folder)} == {5.0}


def test_the_whole_return_with_a_learned_value_is_refused(reinforce, quick, capsys):
    with pytest.raises(SystemExit) as stop:
        reinforce.Args(**quick | {"reward_to_go": False})
    assert stop.value.code == 2
    assert "whole episodes" in capsys.readouterr().err


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_reinforce_learns_with_each_baseline(reinforce, tmp_path, monkeypatch, baseline):
    def make_envs(args, env_seeds, render_mode=None):
        envs = gymnasium.vector.SyncVectorEnv([Reach for _ in env_seeds])
        envs.reset(seed=env_seeds)
        return envs

    monkeypatch.setattr(reinforce, "make_envs", make_envs)
    args = reinforce.Args(
        env_id="Reach", total_timesteps=40_000, baseline=baseline, horizon=21, num_steps=21, num_envs=16,
        learning_rate=1e-2, num_evaluations=1, run_dir=str(tmp_path),
    )  # fmt: skip
    (folder,) = reinforce.train(args)
    assert float(read_metrics(folder)[-1]["eval_return"]) > -8  # standing still is worth -27, going straight -3
