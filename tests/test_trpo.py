"""TRPO's linear algebra against explicit matrices, and its line search."""

import gymnasium
import numpy as np
import pytest
import torch
from test_ppo import WALKER, random_rollout

CHOICES = gymnasium.spaces.Discrete(3)
SPACES = {"normal": WALKER[1], "softmax": CHOICES}


def problem(trpo, space="normal", **arguments):
    """A small agent, its batch and its arguments."""
    args = trpo.Args(**{"num_seeds": 2, "num_envs": 4, "num_steps": 8, "hidden_size": 5} | arguments)
    agent = trpo.Agent(WALKER[0], SPACES[space], args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.ones_like(parameter).cumsum(-1).sin())
    rollout = random_rollout(trpo, args)
    if space == "softmax":
        rollout["actions"] = (rollout["actions"][..., :1] > 0).float()
    batch = trpo.compute_targets(agent, rollout, torch.zeros(args.num_seeds, args.num_envs), args)
    return agent, batch, args


def explicit_fisher(trpo, agent, batch, k):
    """E[ J^T M J ] over the valid rows of seed k, J the Jacobian of the policy's outputs and M their own Fisher matrix:
    1 / sigma^2 for a mean, 2 for a log_std, diag(p) - p p^T for logits."""
    parameters = agent.policy_parameters()
    theta = trpo.flatten(parameters).detach()
    obs = batch["obs"][k : k + 1][:, batch["valid"][k]]

    def outputs(own):
        vectors = torch.cat([theta[:k], own[None], theta[k + 1 :]])
        own_policy = agent.policy_of([part[k : k + 1] for part in trpo.unflatten(vectors, parameters)], obs)
        return own_policy if agent.discrete else (own_policy[0], own_policy[1].expand_as(own_policy[0]))

    jacobians = torch.autograd.functional.jacobian(outputs, theta[k])
    policy = outputs(theta[k])
    total = torch.zeros(len(theta[k]), len(theta[k]))
    for i in range(obs.shape[1]):
        if agent.discrete:
            p = policy[0][0, i].softmax(-1)
            J = jacobians[0][0, i]
            total += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
        else:
            J_mean, J_log_std = jacobians[0][0, i], jacobians[1][0, i]
            total += J_mean.T @ torch.diag((-2 * policy[1][0, i]).exp()) @ J_mean + 2 * J_log_std.T @ J_log_std
    return total / obs.shape[1]


@pytest.mark.parametrize("space", SPACES)
def test_fisher_product_against_the_explicit_matrix(trpo, space):
    agent, batch, args = problem(trpo, space)
    parameters, policy = agent.policy_parameters(), agent.policy(batch["obs"])
    old_policy = tuple(part.detach().clone() for part in policy)
    kl = trpo.masked_mean(trpo.kl_divergence(old_policy, policy), batch["valid"])
    assert kl.abs().max() < 1e-6
    product = trpo.fisher_product(policy, kl, parameters, args.cg_damping)
    vector = torch.randn(2, trpo.flatten(parameters).shape[1], generator=torch.Generator().manual_seed(0))
    images = product(vector)
    for k in range(2):
        expected = explicit_fisher(trpo, agent, batch, k) @ vector[k] + args.cg_damping * vector[k]
        torch.testing.assert_close(images[k], expected, rtol=1e-3, atol=1e-4)


def test_conjugate_gradient_against_a_direct_solve(trpo):
    torch.manual_seed(0)
    square = torch.randn(3, 8, 8).double()
    A, b = square @ square.mT + 0.5 * torch.eye(8), torch.randn(3, 8).double()
    b[1] = 0  # nothing to solve: 0, not NaN

    def product(v):
        return (A @ v.unsqueeze(-1)).squeeze(-1)

    expected = torch.linalg.solve(A, b)
    for iterations in (16, 40):  # once it has converged it stands still
        x = trpo.conjugate_gradient(product, b, iterations)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(x[1], torch.zeros(8).double())
    norms = [(product(trpo.conjugate_gradient(product, b, i)) - b).norm() for i in (1, 4, 8)]
    assert norms[0] > norms[1] > norms[2]
    b[2] = torch.nan
    x = trpo.conjugate_gradient(product, b, 16)
    torch.testing.assert_close(x[:2], expected[:2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("iterations", [100, 200, 1000])
def test_conjugate_gradient_keeps_a_solution_in_float32(trpo, iterations):
    """Whose residual would shrink to the smallest numbers there are, and their quotients blow it up again."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 10, 10).double())[0]
    A = basis @ torch.diag(torch.logspace(-1, 0, 10).double()) @ basis.mT
    b = torch.randn(64, 10)
    expected = torch.linalg.solve(A, b.double())
    A = A.float()
    x = trpo.conjugate_gradient(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b, iterations)
    assert (x - expected).norm() < 1e-5 * expected.norm()


def test_the_step_is_scaled_to_the_trust_region(trpo):
    """Without a line search the step is sqrt(2 delta / x^T F x) x: for a small delta, a KL of delta, damping aside."""
    agent, batch, args = problem(trpo, line_search_steps=0, target_kl=1e-5, cg_damping=0.0, cg_iterations=30)
    losses = trpo.update_policy(agent, batch, args)
    assert losses["approx_kl"].tolist() == pytest.approx([1e-5, 1e-5], rel=0.1)


@pytest.mark.parametrize("space", SPACES)
def test_the_step_is_along_the_natural_gradient(trpo, space):
    agent, batch, args = problem(trpo, space, line_search_steps=0, cg_damping=0.1, cg_iterations=50)
    parameters = agent.policy_parameters()
    theta = trpo.flatten(parameters).detach()
    log_probs = trpo.log_prob(batch["actions"], agent.policy(batch["obs"]))  # whose gradient is the ratio's
    surrogate = trpo.masked_mean(log_probs * batch["advantages"], batch["valid"]).sum()
    gradient = trpo.flatten(torch.autograd.grad(surrogate, parameters))
    expected = []
    for k in range(2):
        fisher = explicit_fisher(trpo, agent, batch, k) + 0.1 * torch.eye(theta.shape[1])
        x = torch.linalg.solve(fisher, gradient[k])
        expected.append((2 * args.target_kl / (x @ fisher @ x)).sqrt() * x)
    trpo.update_policy(agent, batch, args)
    step = trpo.flatten(agent.policy_parameters()).detach() - theta
    torch.testing.assert_close(step, torch.stack(expected), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_the_step_gains_within_the_limit_for_every_seed(trpo, space):
    agent, batch, args = problem(trpo, space, num_seeds=4, target_kl=0.02)
    before = trpo.masked_mean(batch["advantages"], batch["valid"])
    losses = trpo.update_policy(agent, batch, args)
    assert losses["accepted"].tolist() == [1] * 4
    assert (losses["approx_kl"] <= 0.02 + 1e-6).all()
    assert (losses["approx_kl"] > 0.002).all()
    assert (-losses["policy_loss"] > before).all()


def test_the_line_search_takes_the_longest_good_candidate(trpo):
    agent, batch, args = problem(trpo, target_kl=0.01, line_search_decay=0.6)
    parameters = agent.policy_parameters()
    theta = trpo.flatten(parameters).detach()
    ratio = trpo.log_prob(batch["actions"], agent.policy(batch["obs"]))
    gradient = torch.autograd.grad(trpo.masked_mean(ratio * batch["advantages"], batch["valid"]).sum(), parameters)
    step = trpo.flatten(gradient)
    step = torch.tensor([[1.0], [0.2]]) * step / step.norm(dim=1, keepdim=True)  # too long, one more than the other
    old_policy = tuple(part.detach().clone() for part in agent.policy(batch["obs"]))
    found, lengths = trpo.line_search(agent, step, old_policy, batch, args)
    assert 0 < lengths[0] < lengths[1] < 1
    for k in range(2):
        for j in range(args.line_search_steps):
            own = theta + args.line_search_decay**j * step
            policy = agent.policy_of(trpo.unflatten(own, parameters), batch["obs"])
            ratio = (trpo.log_prob(batch["actions"], policy) - trpo.log_prob(batch["actions"], old_policy)).exp()
            gain = trpo.masked_mean((ratio - 1) * batch["advantages"], batch["valid"])[k]
            kl = trpo.masked_mean(trpo.kl_divergence(old_policy, policy), batch["valid"])[k]
            if gain > 0 and kl <= args.target_kl:
                torch.testing.assert_close(found[k], own[k])
                assert lengths[k].item() == pytest.approx(args.line_search_decay**j)
                break
    # Advantages that are not centred: what counts is the gain over the old policy, not the surrogate itself
    batch["advantages"] = batch["advantages"] + 5.0 * batch["valid"]
    ratio = trpo.log_prob(batch["actions"], agent.policy(batch["obs"]))
    gradient = torch.autograd.grad(trpo.masked_mean(ratio * batch["advantages"], batch["valid"]).sum(), parameters)
    downhill = -trpo.flatten(gradient)
    downhill = 1e-2 * downhill / downhill.norm(dim=1, keepdim=True)
    assert trpo.line_search(agent, downhill, old_policy, batch, args)[1].tolist() == [0, 0]


def test_the_limit_is_on_the_kl_from_the_old_policy_to_the_new(trpo):
    """Where all actions are the mean, a narrower policy gains; its KL(old, new) is far above KL(new, old)."""
    agent, batch, args = problem(trpo, target_kl=0.5, line_search_decay=0.9)
    with torch.no_grad():
        batch["actions"], batch["advantages"] = agent.policy(batch["obs"])[0], batch["valid"].float()
    old_policy = tuple(part.detach().clone() for part in agent.policy(batch["obs"]))
    step = torch.zeros_like(trpo.flatten(agent.policy_parameters()).detach())
    step[:, -2:] = -1.0  # of both dimensions' log_std
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    fits = [2 * kl(normal(0.0, 1.0), normal(0.0, np.exp(-(0.9**j)))) <= 0.5 for j in range(args.line_search_steps)]
    lengths = trpo.line_search(agent, step, old_policy, batch, args)[1]
    assert lengths.tolist() == pytest.approx([0.9 ** fits.index(True)] * 2)


def test_the_kl_of_an_update_is_told_as_it_is(trpo):
    agent, batch, args = problem(trpo, target_kl=0.5)
    old = [part.detach().clone() for part in agent.policy(batch["obs"])]
    told, new = trpo.update_policy(agent, batch, args)["approx_kl"], agent.policy(batch["obs"])
    normals = [torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new)]
    kl = torch.distributions.kl_divergence(*normals).sum(-1)
    assert told.tolist() == pytest.approx([kl[k][batch["valid"][k]].mean().item() for k in range(2)], rel=1e-3)


def test_the_critics_gradient_is_that_of_its_minibatch_alone(trpo):
    agent, batch, _ = problem(trpo)
    still, found = torch.optim.SGD(agent.critic.parameters(), 0.0), []
    for _ in range(2):
        trpo.update_critic(agent, still, batch)
        found.append([parameter.grad.clone() for parameter in agent.critic.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_values_move_after_the_policy(trpo, quick, monkeypatch):
    """So that explained_variance is that of the V which the advantages were taken from."""
    seen = []
    for name in ("update_policy", "update_critic"):
        own = getattr(trpo, name)
        monkeypatch.setattr(trpo, name, lambda *parts, name=name, own=own: seen.append(name) or own(*parts))
    trpo.train(trpo.Args(**quick | {"total_timesteps": 64, "num_evaluations": 0}))
    assert seen == ["update_policy"] + ["update_critic"] * 8


@pytest.mark.parametrize("space", SPACES)
def test_a_search_that_fails_restores_the_parameters_exactly(trpo, space):
    agent, batch, args = problem(trpo, space)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    batch["advantages"][1] = 0  # seed 1 cannot improve, so its gradient is 0 and no candidate gains
    losses = trpo.update_policy(agent, batch, args)
    assert losses["accepted"].tolist() == [1, 0]
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert tensor.isfinite().all()
    theta = trpo.flatten(agent.policy_parameters()).detach()
    old_policy = tuple(part.detach().clone() for part in agent.policy(batch["obs"]))
    found, lengths = trpo.line_search(agent, torch.full_like(theta, torch.nan), old_policy, batch, args)
    assert torch.equal(found, theta)
    assert lengths.tolist() == [0, 0]


@pytest.mark.parametrize("line_search_steps", [0, 10])
def test_the_standard_deviation_stays_above_its_floor(trpo, line_search_steps):
    ends = {}
    for floor in (-1.0, -9.0):
        agent, batch, args = problem(trpo, line_search_steps=line_search_steps, log_std_min=floor, log_std_init=-0.9)
        with torch.no_grad():
            agent.log_std.fill_(-0.99)
            batch["actions"] = agent.policy(batch["obs"])[0]  # at the mean: a narrower policy makes them likelier
            batch["advantages"] = batch["advantages"].abs() + 1
        losses = trpo.update_policy(agent, batch, args)
        assert losses["accepted"].tolist() == [1, 1]
        assert (losses["approx_kl"] <= args.target_kl * (1.001 if line_search_steps else 1.5)).all()
        ends[floor] = agent.log_std.detach()
    assert (ends[-9.0] < -1.01).all()
    torch.testing.assert_close(ends[-1.0], torch.full_like(ends[-1.0], -1.0))


@pytest.mark.parametrize("line_search_steps", [0, 10])
def test_nan_stays_in_its_seed(trpo, line_search_steps):
    results = []
    for dirt in (False, True):
        agent, batch, args = problem(trpo, num_seeds=3, line_search_steps=line_search_steps)
        if dirt:
            batch["advantages"][1] = torch.nan
        trpo.update_policy(agent, batch, args)
        results.append([tensor.clone() for tensor in agent.policy_parameters()])
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()  # a seed whose step is not finite stays where it is
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[2], dirty[2])


def test_a_reset_row_changes_nothing(trpo):
    results = []
    for filler in (0.0, 5.0, float("nan")):
        args = trpo.Args(num_seeds=2, num_envs=4, num_steps=8)
        agent = trpo.Agent(*WALKER, args)
        rollout = random_rollout(trpo, args)
        for name in ("actions", "rewards"):
            rollout[name][~rollout["valid"]] = filler
        batch = trpo.compute_targets(agent, rollout, torch.zeros(2, 4), args)
        losses = trpo.update_policy(agent, batch, args)
        optimizer = torch.optim.Adam(agent.critic.parameters(), torch.tensor(1e-3), fused=True)
        losses |= trpo.update_critic(agent, optimizer, batch)
        results.append([*losses.values(), *agent.state_dict().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_seeds_together_equal_seeds_alone(trpo, space):
    size = {"num_envs": 8, "num_steps": 16}
    together = trpo.Args(num_seeds=3, **size)
    rollouts = [random_rollout(trpo, together, seed) for seed in range(3)]
    if space == "softmax":
        for rollout in rollouts:
            rollout["actions"] = (rollout["actions"][..., :1] > 0).float()

    def learn(args, rollouts):
        agent = trpo.Agent(WALKER[0], SPACES[space], args)
        optimizer = torch.optim.Adam(agent.critic.parameters(), torch.tensor(1e-3), fused=True)
        carry = torch.zeros(args.num_seeds, args.num_envs)
        for rollout in rollouts:
            batch = trpo.compute_targets(agent, rollout, carry, args)
            trpo.update_policy(agent, batch, args)
            trpo.update_critic(agent, optimizer, batch)
            agent.obs_stats.update(trpo.seeds_first(rollout["obs"][:-1]), batch["valid"])
        return agent

    agent = learn(together, rollouts)
    for k in range(3):
        own = [{name: x[:, k : k + 1] for name, x in rollout.items()} for rollout in rollouts]
        alone = learn(trpo.Args(seed=1 + k, **size), own)
        for name, ours in agent.state_dict().items():
            torch.testing.assert_close(ours[k : k + 1], alone.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_kl_of_a_softmax_against_torch_distributions(trpo):
    torch.manual_seed(0)
    old, new = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (old, new)))
    assert torch.allclose(trpo.kl_divergence((old,), (new,)), expected, atol=1e-5)
