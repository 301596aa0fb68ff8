"""PPO's equations, against slow loops and numbers worked out by hand."""

import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

WALKER = gymnasium.spaces.Box(-np.inf, np.inf, (5,)), gymnasium.spaces.Box(-1, 1, (2,))


def episode_flags(rng, T, shape, p_end):
    """terminated, done and valid as next-step auto-reset gives them: each end is followed by a reset row."""
    terminated, done, valid = (np.zeros((T, *shape), bool) for _ in range(3))
    previous = rng.random(shape) < p_end  # the rollout before may have ended on a done row
    for t in range(T):
        valid[t] = ~previous
        done[t] = valid[t] & (rng.random(shape) < p_end)
        terminated[t] = done[t] & (rng.random(shape) < 0.5)
        previous = done[t]
    return terminated, done, valid


def random_rollout(ppo, args, seed=0, p_end=0.2):
    rng = np.random.default_rng(seed)
    T, S, N = args.num_steps, args.num_seeds, args.num_envs
    terminated, done, valid = episode_flags(rng, T, (S, N), p_end)
    floats = {"obs": (T + 1, S, N, 5), "actions": (T, S, N, 2), "rewards": (T, S, N)}
    rollout = {name: torch.tensor(rng.normal(size=shape), dtype=torch.float32) for name, shape in floats.items()}
    rollout["rewards"] *= torch.tensor(valid)
    return rollout | {"terminated": torch.tensor(terminated), "done": torch.tensor(done), "valid": torch.tensor(valid)}


def learner(ppo, args):
    agent = ppo.Agent(*WALKER, args)
    with torch.no_grad():  # the first policy hardly depends on the observation, and such a test on the network
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.ones_like(parameter).cumsum(-1).sin())
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    return agent, torch.optim.Adam(trained, torch.tensor(1e-3), eps=1e-5, fused=True)


def iteration(ppo, agent, optimizer, rollout, args, kl_coef=None, epochs=3):
    """A whole update on a rollout, minibatches in their order; returns the last losses and gradients."""
    kl_coef = torch.zeros(args.num_seeds) if kl_coef is None else kl_coef
    carry = torch.zeros(args.num_seeds, args.num_envs)
    batch = ppo.compute_targets(agent, rollout, carry, args)
    for _ in range(epochs):
        for i in range(0, args.batch_size, args.minibatch_size):
            minibatch = {name: x[:, i : i + args.minibatch_size] for name, x in batch.items()}
            losses = ppo.update_minibatch(agent, optimizer, minibatch, kl_coef, args)
    losses |= ppo.finish_iteration(agent, rollout, batch, kl_coef, args)
    return losses, [parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), T=st.integers(1, 12), p_end=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1),
)  # fmt: skip
def test_gae_equals_its_definition(seed, T, p_end, gamma, gae_lambda):
    from conftest import ROOT, load_script

    ppo = load_script(ROOT / "algos" / "ppo_continuous.py")
    rng = np.random.default_rng(seed)
    terminated, done, valid = episode_flags(rng, T, (2, 3), p_end)
    rewards, values = rng.normal(size=(T, 2, 3)), rng.normal(size=(T + 1, 2, 3))
    tensors = (torch.tensor(x) for x in (rewards, values, terminated, done))
    advantages = ppo.compute_gae(*tensors, gamma, gae_lambda).numpy()
    for t, s, n in np.argwhere(valid):
        expected, weight = 0.0, 1.0
        for later in range(t, T):
            bootstrap = 0.0 if terminated[later, s, n] else gamma * values[later + 1, s, n]
            expected += weight * (rewards[later, s, n] + bootstrap - values[later, s, n])
            weight *= gamma * gae_lambda
            if done[later, s, n]:
                break
        assert advantages[t, s, n] == pytest.approx(expected, abs=1e-9)


def test_truncation_bootstraps_and_termination_does_not(ppo):
    values = torch.tensor([[[1.0, 1.0, 1.0]], [[10.0, 10.0, 10.0]]])
    rewards = torch.full((1, 1, 3), 2.0)
    terminated = torch.tensor([[[True, False, False]]])
    done = torch.tensor([[[True, True, False]]])  # terminated, truncated, cut by the end of the rollout
    advantages = ppo.compute_gae(rewards, values, terminated, done, 0.5, 0.9)
    assert advantages.flatten().tolist() == [2 - 1, 2 + 0.5 * 10 - 1, 2 + 0.5 * 10 - 1]


def test_a_reset_row_changes_nothing(ppo):
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=4)
    results = []
    for filler in (0.0, 1e3, -7.0, float("nan")):
        rollout = random_rollout(ppo, args)
        reset_rows = ~rollout["valid"]
        assert reset_rows.any()
        rollout["actions"][reset_rows] = filler
        rollout["rewards"][reset_rows] = filler
        agent, optimizer = learner(ppo, args)
        losses, gradients = iteration(ppo, agent, optimizer, rollout, args)
        results.append([*losses.values(), *gradients, *agent.state_dict().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_last_observation_that_is_not_finite_stays_where_it_is(ppo):
    """A task may end an episode because its state has blown up: no value is bootstrapped from it, no weight sees it."""
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=4)
    rollout = random_rollout(ppo, args)
    after_termination = torch.zeros(9, 2, 4, dtype=torch.bool)
    after_termination[1:] = rollout["terminated"]
    assert after_termination[:8].any()
    rollout["obs"][after_termination] = torch.nan
    agent, optimizer = learner(ppo, args)
    iteration(ppo, agent, optimizer, rollout, args)
    assert all(tensor.isfinite().all() for tensor in agent.state_dict().values())


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo"], indirect=True)
def test_advantages_are_normalised_over_valid_rows_or_not_at_all(script, norm_adv):
    args = script.Args(num_seeds=2, num_envs=4, num_steps=8, norm_adv=norm_adv)
    agent = script.Agent(*WALKER, args)
    batch = script.compute_targets(agent, random_rollout(script, args), torch.zeros(2, 4), args)
    plain = (batch["returns"] - agent.critic(batch["obs"]).squeeze(-1)).detach()
    for k in range(2):
        own, raw = (x[k][batch["valid"][k]] for x in (batch["advantages"], plain))
        wanted = (raw - raw.mean()) / raw.std(correction=0) if norm_adv else raw
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_the_first_ratio_is_one(ppo):
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=1, norm_adv=False)
    agent, optimizer = learner(ppo, args)
    batch = ppo.compute_targets(agent, random_rollout(ppo, args), torch.zeros(2, 4), args)
    losses = ppo.update_minibatch(agent, optimizer, batch, torch.zeros(2), args)
    assert losses["clipfrac"].tolist() == [0, 0]
    assert torch.allclose(losses["policy_loss"], -ppo.masked_mean(batch["advantages"], batch["valid"]), atol=1e-6)


def test_clipped_loss_by_hand(ppo):
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 9.0]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 9.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    # min(3, 2.4), min(-3, -2.4), min(1, 1.6), min(-1, -1.6)
    expected = -(2.4 - 3.0 + 1.0 - 1.6) / 4
    assert ppo.policy_loss_clip(ratio, advantages, valid, 0.2).item() == pytest.approx(expected, abs=1e-6)


def test_kl_penalty_by_hand(ppo):
    valid = torch.tensor([[True, True, False]])
    loss = ppo.policy_loss_kl(
        torch.tensor([[2.0, 1.0, 5.0]]), torch.tensor([[1.0, 3.0, 5.0]]), valid, torch.tensor([[0.1, 0.3, 9.0]]),
        torch.tensor([4.0]),
    )  # fmt: skip
    assert loss.item() == pytest.approx(-(2 + 3) / 2 + 4 * 0.2)
    kl_coef = ppo.adapt_kl_coef(torch.ones(5), torch.tensor([0.016, 0.014, 0.01, 0.007, 0.006]), 0.01)
    assert kl_coef.tolist() == [2.0, 1.0, 1.0, 1.0, 0.5]
    for kl, bound in ((1.0, 1e4), (0.0, 1e-4)):  # neither end is one of no return
        kl_coef = torch.tensor([1.0])
        for _ in range(200):
            kl_coef = ppo.adapt_kl_coef(kl_coef, torch.tensor([kl]), 0.01)
        assert kl_coef.item() == pytest.approx(bound)


def test_actions_stay_within_bounds_of_any_kind(ppo):
    for low, high in ((-2.0, 2.0), (-0.3, 0.7), (0.0, np.inf), (-np.inf, np.inf), (-3e38, 3e38)):
        space = gymnasium.spaces.Box(low, high, (1,))
        agent = ppo.Agent(WALKER[0], space, ppo.Args())
        actions = agent.to_task(torch.linspace(-5, 5, 11).reshape(1, 11, 1)).flatten()
        assert actions.min() >= low
        assert actions.max() <= high
        if high - low < 10:  # -1 and 1 of the policy are the bounds
            assert actions[[4, 5, 6]].tolist() == pytest.approx([low, (low + high) / 2, high])
        else:  # the unit is the task's own; a range of 6e38 is no float32
            assert actions[-1] == 5


def test_the_kl_penalty_begins_with_the_coefficient_asked_for_and_is_adapted(ppo, quick, monkeypatch):
    seen, update = [], ppo.update_minibatch

    def watched(agent, optimizer, minibatch, kl_coef, args):
        seen.append(kl_coef.tolist())
        return update(agent, optimizer, minibatch, kl_coef, args)

    monkeypatch.setattr(ppo, "update_minibatch", watched)
    ppo.train(ppo.Args(**quick | {"num_seeds": 2, "kl_coef": 10.0, "target_kl": 1e3}))
    assert seen == [[10 / 2 ** (i // 8)] * 2 for i in range(80)]  # halved after each iteration, of 8 minibatches


def test_kl_penalty_is_used_and_adapted_per_seed(ppo):
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=4, kl_coef=1.0, target_kl=1e-9)
    agent, optimizer = learner(ppo, args)
    kl_coef = torch.tensor([1.0, 3.0])
    losses, _ = iteration(ppo, agent, optimizer, random_rollout(ppo, args), args, kl_coef)
    assert (losses["approx_kl"] > 1.5e-9).all()
    assert kl_coef.tolist() == [2.0, 6.0]


def test_the_kl_penalty_is_that_from_the_old_policy_to_the_new_with_a_gradient(ppo):
    """Without advantages the loss is the penalty alone. The old policy is the wider one here: KL is not symmetric."""
    args = ppo.Args(num_envs=4, num_steps=8, num_minibatches=1, kl_coef=3.0, vf_coef=0.0)
    agent, optimizer = learner(ppo, args)
    rollout, normal = random_rollout(ppo, args), torch.distributions.Normal
    batch = ppo.compute_targets(agent, rollout, torch.zeros(1, 4), args)
    batch |= {"advantages": batch["advantages"] * 0, "old_log_std": batch["old_log_std"] + 0.5}
    batch["old_mean"] = batch["old_mean"] + 0.3  # at the same mean there is no gradient
    old = normal(batch["old_mean"], batch["old_log_std"].exp())
    new = normal(agent.actor(batch["obs"]), agent.log_std.exp())
    kl = ppo.masked_mean(torch.distributions.kl_divergence(old, new).sum(-1), batch["valid"]).item()
    found = ppo.finish_iteration(agent, rollout, batch, torch.ones(1), args)
    assert found["approx_kl"].item() == pytest.approx(kl, rel=1e-4)
    losses = ppo.update_minibatch(agent, optimizer, batch, torch.tensor([3.0]), args)
    assert losses["policy_loss"].item() == pytest.approx(3 * kl, rel=1e-3)
    assert losses["grad_norm"].item() > 0


@pytest.mark.parametrize("clip_coef", [0.2, 0.05])
def test_the_share_of_clipped_ratios_counts_both_sides(ppo, clip_coef):
    args = ppo.Args(num_envs=4, num_steps=8, num_minibatches=1, clip_coef=clip_coef)
    agent, optimizer = learner(ppo, args)
    batch = ppo.compute_targets(agent, random_rollout(ppo, args), torch.zeros(1, 4), args)
    shift = torch.linspace(-0.4, 0.4, batch["valid"].shape[1])[None]
    batch["old_log_probs"] = batch["old_log_probs"] + shift
    ratio = (-shift).exp()
    outside = (ratio - 1).abs() > clip_coef
    losses = ppo.update_minibatch(agent, optimizer, batch, torch.zeros(1), args)
    loss = ppo.policy_loss_clip(ratio, batch["advantages"], batch["valid"], clip_coef)
    assert losses["policy_loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert losses["clipfrac"].item() == pytest.approx(outside[batch["valid"]].float().mean().item(), abs=1e-6)


def test_values_are_clipped_around_those_of_the_rollout(ppo):
    args = ppo.Args(num_envs=4, num_steps=8, num_minibatches=1, clip_vloss=True)
    agent, optimizer = learner(ppo, args)
    batch = ppo.compute_targets(agent, random_rollout(ppo, args), torch.zeros(1, 4), args)
    batch["old_values"] = batch["old_values"] + 1
    values = agent.critic(batch["obs"]).squeeze(-1).detach()
    wanted = ppo.value_loss(values, batch["old_values"], batch["returns"], batch["valid"], args.clip_coef).item()
    losses = ppo.update_minibatch(agent, optimizer, batch, torch.zeros(1), args)
    assert losses["value_loss"].item() == pytest.approx(wanted, rel=1e-4)


def test_value_loss_by_hand(ppo):
    values, old, returns = torch.tensor([[3.0, 0.1]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert ppo.value_loss(values, old, returns, valid, None).item() == pytest.approx((1 + 0.81) / 4)
    # clipped values are 1.2 and 0.1: errors max(1, 0.64), max(0.81, 0.81)
    assert ppo.value_loss(values, old, returns, valid, 0.2).item() == pytest.approx((1 + 0.81) / 4)
    old = torch.tensor([[4.0, 0.0]])  # clipped value 3.8: error max(1, 3.24)
    assert ppo.value_loss(values, old, returns, valid, 0.2).item() == pytest.approx((3.24 + 0.81) / 4, abs=1e-6)


@pytest.mark.parametrize("script", ["a2c", "reinforce", "trpo"], indirect=True)
def test_a_normal_policy_against_torch_distributions(script):
    torch.manual_seed(0)
    old, new = ((torch.randn(2, 7, 3), torch.randn(2, 1, 3)) for _ in range(2))
    actions = torch.randn(2, 7, 3)
    wanted_old, wanted = (torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new))
    torch.testing.assert_close(script.log_prob(actions, new), wanted.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(script.entropy(new), wanted.entropy().sum(-1))
    if script.__name__ == "trpo":
        kl = torch.distributions.kl_divergence(wanted_old, wanted).sum(-1)
        torch.testing.assert_close(script.kl_divergence(old, new), kl, rtol=1e-4, atol=1e-5)


def test_normal_against_torch_distributions(ppo):
    torch.manual_seed(0)
    mean, old_mean, actions = torch.randn(3, 7, 4), torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    log_std, old_log_std = torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    new, old = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), (old_mean, old_log_std)))
    expected = new.log_prob(actions).sum(-1)
    assert torch.allclose(ppo.normal_log_prob(actions, mean, log_std), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ppo.normal_entropy(log_std), torch.distributions.Normal(0, log_std.exp()).entropy().sum(-1))
    expected = torch.distributions.kl_divergence(old, new).sum(-1)
    assert torch.allclose(ppo.normal_kl(old_mean, old_log_std, mean, log_std), expected, rtol=1e-4, atol=1e-5)


def test_gradient_norm_is_clipped_per_seed(ppo):
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, 3)), torch.nn.Parameter(torch.zeros(2, 1, 4))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[1] *= 1e-3
    norm = ppo.clip_grad_norm(parameters, 0.5)
    assert norm.tolist() == pytest.approx([10**0.5, 1e-3 * 10**0.5], rel=1e-5)
    after = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()
    assert after.tolist() == pytest.approx([0.5, 1e-3 * 10**0.5], rel=1e-4)


def test_the_step_is_that_of_the_clipped_gradient(ppo):
    args = ppo.Args(num_seeds=2, num_envs=4, num_steps=8, num_minibatches=1, max_grad_norm=0.01)
    agent, _ = learner(ppo, args)
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    batch = ppo.compute_targets(agent, random_rollout(ppo, args), torch.zeros(2, 4), args)
    losses = ppo.update_minibatch(agent, torch.optim.SGD(trained, 1.0), batch, torch.zeros(2), args)
    assert (losses["grad_norm"] > 0.01).all()
    moved = [(parameter - old).detach().flatten(1) for parameter, old in zip(trained, before, strict=True)]
    assert torch.cat(moved, 1).norm(dim=1).tolist() == pytest.approx([0.01] * 2, rel=1e-3)


def test_running_statistics_equal_those_of_all_valid_rows(ppo):
    rng = np.random.default_rng(0)
    stats = ppo.RunningMeanStd(2, 3)
    x, valid = rng.normal(5, 3, (2, 200, 3)), rng.random((2, 200)) < 0.7
    for i in range(0, 200, 20):
        stats.update(torch.tensor(x[:, i : i + 20], dtype=torch.float32), torch.tensor(valid[:, i : i + 20]))
    for k in range(2):
        assert stats.mean[k, 0].numpy() == pytest.approx(x[k][valid[k]].mean(0), rel=1e-5)
        assert stats.var[k, 0].numpy() == pytest.approx(x[k][valid[k]].var(0), rel=1e-4)
        assert stats.count[k].item() == valid[k].sum()


def test_discounted_sums_cross_rollouts_and_stop_at_episode_ends(ppo):
    rewards = torch.ones(6, 1, 1)
    done = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool).reshape(6, 1, 1)
    carry = torch.zeros(1, 1)
    sums = torch.cat([ppo.discounted_sums(rewards[i : i + 2], done[i : i + 2], carry, 0.5) for i in (0, 2, 4)])
    assert sums.flatten().tolist() == [1, 1.5, 1.75, 1, 1.5, 1.75]


# ------------------------------------------------------------------------------------------------------- seed axis


@pytest.mark.parametrize("kl_coef", [None, 0.5])
def test_seeds_together_equal_seeds_alone(ppo, kl_coef):
    kwargs = {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "kl_coef": kl_coef}
    together = ppo.Args(num_seeds=3, **kwargs)
    agent, optimizer = learner(ppo, together)
    rollouts = [random_rollout(ppo, together, seed) for seed in range(4)]
    coefficient = torch.full((3,), kl_coef or 0.0)
    for rollout in rollouts:
        iteration(ppo, agent, optimizer, rollout, together, coefficient)
    for k in range(3):
        alone = ppo.Args(seed=1 + k, **kwargs)
        own_agent, own_optimizer = learner(ppo, alone)
        own_coefficient = torch.full((1,), kl_coef or 0.0)
        for rollout in rollouts:
            own = {name: x[:, k : k + 1] for name, x in rollout.items()}
            iteration(ppo, own_agent, own_optimizer, own, alone, own_coefficient)
        for (name, ours), theirs in zip(agent.state_dict().items(), own_agent.state_dict().values(), strict=True):
            torch.testing.assert_close(ours[k : k + 1], theirs, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)
        assert coefficient[k] == own_coefficient[0]


@pytest.mark.parametrize("poisoned", ["obs", "rewards", "actions"])
def test_nan_in_one_seed_leaves_the_others_bit_identical(ppo, poisoned):
    args = ppo.Args(num_seeds=3, num_envs=4, num_steps=8, num_minibatches=4)
    states = []
    for poison in (False, True):
        agent, optimizer = learner(ppo, args)
        for seed in range(2):
            rollout = random_rollout(ppo, args, seed)
            if poison:
                rollout[poisoned][3, 1, 2] = torch.nan
                rollout["valid"][3, 1, 2] = True
            iteration(ppo, agent, optimizer, rollout, args)
        states.append(agent.state_dict())
    clean, dirty = states
    assert not all(tensor[1].isfinite().all() for tensor in dirty.values())
    for name in clean:
        assert torch.equal(clean[name][[0, 2]], dirty[name][[0, 2]]), name


def test_first_weights_do_not_depend_on_the_company(ppo):
    agents = [ppo.Agent(*WALKER, ppo.Args(seed=s, num_seeds=n)) for s, n in ((3, 1), (1, 4), (2, 2))]
    for name, alone in agents[0].state_dict().items():
        assert torch.equal(alone[0], agents[1].state_dict()[name][2]), name
        assert torch.equal(alone[0], agents[2].state_dict()[name][1]), name
    weights = agents[1].actor[0].weight
    assert not torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0] @ weights[0].T, 2 * torch.eye(5), atol=1e-5)  # orthogonal, gain sqrt 2


@pytest.mark.slow
def test_compiled_gradient_steps_are_those_of_eager_execution(ppo, quick):
    states = []
    for compiled in (False, True):
        (folder,) = ppo.train(ppo.Args(compile=compiled, **quick))
        states.append(torch.load(folder / "checkpoint.pt", weights_only=True)["state"])
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


STEPS = {"ppo_continuous": "update_minibatch", "trpo": "update_critic", "a2c": "update", "reinforce": "update"}


@pytest.mark.parametrize("changes", [{}, {"anneal_lr": False}, {"optimizer": "rmsprop"}], ids=["", "flat", "rmsprop"])
@pytest.mark.parametrize("script", STEPS, indirect=True)
def test_the_learning_rate_falls_linearly(script, quick, monkeypatch, changes):
    """Over as many gradient steps as epochs and minibatches make."""
    if not all(hasattr(script.Args, name) for name in changes):
        pytest.skip("an option that this script does not have")
    seen, epsilons, update = [], set(), getattr(script, STEPS[script.__name__])

    def watched(agent, optimizer, *rest):
        epsilons.add(optimizer.param_groups[0]["eps"])
        seen.append(float(optimizer.param_groups[0]["lr"]))
        return update(agent, optimizer, *rest)

    monkeypatch.setattr(script, STEPS[script.__name__], watched)
    args = script.Args(**quick | changes)
    script.train(args)
    repeats = {"ppo_continuous": 2 * 4, "trpo": 2 * 4}.get(script.__name__, 1)
    steps = np.arange(0, args.total_timesteps, args.batch_size).repeat(repeats)
    remaining = 1 - steps / args.total_timesteps if args.anneal_lr else np.ones(len(steps))
    np.testing.assert_allclose(seen, args.learning_rate * remaining, rtol=1e-5)
    assert script.__name__ not in ("ppo_continuous", "a2c") or epsilons == {1e-5}


def test_the_standard_deviation_stays_above_its_floor(ppo):
    ends = {}
    for floor in (-1.0, -9.0):
        sizes = {"num_seeds": 2, "num_envs": 4, "num_steps": 8, "num_minibatches": 4}
        args = ppo.Args(**sizes, anneal_log_std=False, log_std_init=-1.0, log_std_min=floor)
        agent, optimizer = learner(ppo, args)
        with torch.no_grad():
            agent.log_std.fill_(-1.0)
        rollout = random_rollout(ppo, args)
        rollout["actions"] *= 0.01  # near the mean whatever the advantage: a narrower policy explains them better
        iteration(ppo, agent, optimizer, rollout, args)
        ends[floor] = agent.log_std.detach()
    assert (ends[-1.0] >= -1.0).all()
    assert (ends[-9.0] < -1.0).any()


def test_an_annealed_standard_deviation_falls_linearly_and_is_not_learned(ppo, quick, monkeypatch):
    seen, compute_targets = [], ppo.compute_targets

    def watched(agent, *rest):
        seen.append(agent.log_std.detach().clone())
        return compute_targets(agent, *rest)

    monkeypatch.setattr(ppo, "compute_targets", watched)
    args = ppo.Args(**quick, log_std_init=0.5, log_std_min=-1.5)
    (folder,) = ppo.train(args)
    begun = np.arange(0, args.total_timesteps, args.batch_size) / args.total_timesteps
    assert len(seen) == len(begun) + 1  # the first one makes the batch's tensors
    for log_std, progress in zip(seen[1:], begun, strict=True):
        np.testing.assert_allclose(log_std.numpy(), 0.5 - 2 * progress, atol=1e-6)
    left = torch.load(folder / "agent.pt", weights_only=True)["agent"]["log_std"]
    assert torch.equal(left, seen[-1])  # after a last update


def test_a_learned_standard_deviation_is_left_to_the_gradient(ppo, quick):
    args = ppo.Args(**quick, anneal_log_std=False, learning_rate=0.0, log_std_init=0.5, log_std_min=-1.5)
    (folder,) = ppo.train(args)
    assert torch.load(folder / "agent.pt", weights_only=True)["agent"]["log_std"].unique().tolist() == [0.5]
    args = ppo.Args(**quick | {"seed": 2}, anneal_log_std=False, log_std_init=0.5, log_std_min=-1.5)
    (folder,) = ppo.train(args)
    assert torch.load(folder / "agent.pt", weights_only=True)["agent"]["log_std"].unique().tolist() != [0.5]


def test_an_entropy_bonus_wants_a_learned_standard_deviation(ppo, capsys):
    with pytest.raises(SystemExit):
        ppo.Args(ent_coef=0.01)
    assert "--no-anneal-log-std" in capsys.readouterr().err
