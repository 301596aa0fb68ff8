"""What `train` collects, hands to the algorithm and writes down, on tasks of which every number is known."""

import copy
import csv
import errno
import json

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_off_policy import Counting, counting_envs
from test_ppo import WALKER, iteration, random_rollout
from test_runs import read_metrics

each_on_policy = pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "trpo", "reinforce"], indirect=True)


class Echo(Counting):
    """Counting, with the action as the reward."""

    def step(self, action):
        obs, _, *ends = super().step(action)
        return obs, float(action[0]), *ends


def echo_envs(args, env_seeds, render_mode=None):
    return gymnasium.vector.SyncVectorEnv([lambda i=i: Echo(i) for i in range(len(env_seeds))])


@each_on_policy
def test_a_rollout_is_what_happened(script, quick, monkeypatch):
    """Each row that counts is a transition that the task made, its end is of the right kind, the observation after it
    is the true one, and the action is the policy's own: of the task's bounds -2 and 2 the reward tells. The statistics
    that normalise are those of all rows that count."""
    seen, compute = [], script.compute_targets

    def watched(agent, rollout, *rest):
        means = agent.actor(agent.normalize(script.seeds_first(rollout["obs"][:-1]))).detach()
        seen.append((means, {name: tensor.clone() for name, tensor in rollout.items()}, agent))
        return compute(agent, rollout, *rest)

    monkeypatch.setattr(script, "compute_targets", watched)
    monkeypatch.setattr(script, "make_envs", echo_envs)
    monkeypatch.setattr(script.torch, "randn_like", torch.zeros_like)  # actions are the means
    task = {"env_id": "Echo", "num_seeds": 2, "num_envs": 3, "total_timesteps": 240, "num_evaluations": 0}
    args = script.Args(**quick | task)
    script.train(args)
    for means, rollout, _ in seen[-5:]:
        torch.testing.assert_close(script.seeds_first(rollout["actions"]), means)
        assert torch.equal(rollout["valid"][1:], ~rollout["done"][:-1])
        for t, seed, n in np.argwhere(rollout["valid"].numpy()):
            env, episode, i = rollout["obs"][t, seed, n].int().tolist()
            end = i + 1 == 2 + (env + episode) % 4
            assert env // 3 == seed
            assert rollout["obs"][t + 1, seed, n].int().tolist() == [env, episode, i + 1]
            assert rollout["done"][t, seed, n] == end
            assert rollout["terminated"][t, seed, n] == (end and env % 2 == 0)
            action = rollout["actions"][t, seed, n, 0].item()
            assert rollout["rewards"][t, seed, n].item() == pytest.approx(2 * np.clip(action, -1, 1), abs=1e-6)
            assert "age" not in rollout or rollout["age"][t, seed, n] == i
    running, observed, sums = torch.zeros(2, 3), ([], []), ([], [])
    for _, rollout, _ in seen:
        for obs, reward, valid, done in zip(*(rollout[x] for x in ("obs", "rewards", "valid", "done")), strict=False):
            running = torch.where(valid, args.gamma * running + reward, running)
            for k in range(2):
                observed[k].append(obs[k][valid[k]])
                sums[k].append(running[k][valid[k]])
            running[done] = 0
    agent = seen[-1][2]
    for stats, rows in ((agent.obs_stats, observed), (agent.return_stats, sums)):
        for k in range(2):
            own = torch.cat(rows[k]).reshape(-1, stats.mean.shape[-1])
            torch.testing.assert_close(stats.mean[k, 0], own.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.var[k, 0], own.var(0, correction=0), rtol=1e-3, atol=1e-5)


@each_on_policy
def test_seeds_explore_apart_with_the_standard_deviation_of_the_policy(script, quick, monkeypatch):
    noise, compute = [], script.compute_targets

    def watched(agent, rollout, *rest):
        if rollout["valid"].any():
            means = agent.actor(agent.normalize(script.seeds_first(rollout["obs"][:-1])))
            noise.append((script.seeds_first(rollout["actions"]) - means).detach() / agent.log_std.detach().exp())
        return compute(agent, rollout, *rest)

    monkeypatch.setattr(script, "compute_targets", watched)
    wide = {"num_seeds": 2, "env_id": "Hopper-v4", "log_std_init": 0.5}  # three dimensions; bounds would show
    script.train(script.Args(**quick | wide))
    rows = torch.cat(noise, dim=1)
    torch.testing.assert_close(rows.std(1), torch.ones(2, 3), rtol=0, atol=0.1)
    apart = torch.corrcoef(rows.transpose(1, 2).flatten(0, 1))  # the dimensions of both seeds
    assert (apart - torch.eye(6)).abs().max() < 0.2


@pytest.mark.parametrize("script", ["ppo_continuous", "trpo"], indirect=True)
def test_each_epoch_takes_every_row_once_in_an_order_of_its_own(script, quick, monkeypatch):
    part = {"ppo_continuous": "update_minibatch", "trpo": "update_critic"}[script.__name__]
    batches, minibatches, compute, step = [], [], script.compute_targets, getattr(script, part)

    def rows_of(rows):
        return torch.cat([rows[name].reshape(*rows["valid"].shape, -1).float() for name in names], -1)

    def watched(*parts):
        batches.append(compute(*parts))
        return batches[-1]

    def watched_step(agent, optimizer, minibatch, *rest):
        minibatches.append(rows_of(minibatch))
        return step(agent, optimizer, minibatch, *rest)

    names = ("obs", "returns", "valid") + ("actions", "advantages") * (part == "update_minibatch")
    monkeypatch.setattr(script, "compute_targets", watched)
    monkeypatch.setattr(script, part, watched_step)
    script.train(script.Args(**quick | {"num_seeds": 2, "total_timesteps": 64}))  # an iteration, of 2 epochs
    epochs = [torch.cat(minibatches[i : i + 4], 1) for i in (0, 4)]
    for epoch in epochs:
        for taken, rows in zip(epoch.tolist(), rows_of(batches[-1]).tolist(), strict=True):
            assert sorted(taken) == sorted(rows)
    assert not torch.equal(*epochs)


@each_on_policy
def test_networks_by_hand(script):
    agent, obs = script.Agent(*WALKER, script.Args(num_seeds=2)), torch.randn(2, 4, 5)
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        a, b, c = (layer.weight for layer in network if isinstance(layer, script.Linear))
        torch.testing.assert_close(network(obs), ((obs @ a).tanh() @ b).tanh() @ c)
        torch.testing.assert_close(torch.linalg.matrix_norm(c, 2), torch.full((2,), gain), rtol=1e-4, atol=0)


@each_on_policy
def test_targets_by_a_slow_loop(script):
    """Normalised observations; rewards over their scale; V after a truncation and none after a termination; the trace
    ends with the episode; returns are those before advantages are normalised."""
    args = script.Args(num_seeds=2, num_envs=3, num_steps=16, gamma=0.9)
    agent = script.Agent(*WALKER, args)
    agent.obs_stats.mean.fill_(0.3)
    agent.obs_stats.var.fill_(4.0)
    for name, value in (("mean", 1.0), ("var", 0.25), ("count", 1e9)):  # so many that a batch moves nothing
        getattr(agent.return_stats, name).fill_(value)
    rollout = random_rollout(script, args, 1, 0.3) | {"age": torch.zeros(16, 2, 3)}
    obs = script.seeds_first((rollout["obs"] - 0.3) / 2)
    values = agent.critic(obs)[..., 0].detach().unflatten(1, (17, 3)).transpose(0, 1)
    extra = [torch.zeros(2, 2)] if script.__name__ == "reinforce" else []
    batch = script.compute_targets(agent, rollout, torch.zeros(2, 3), *extra, args)
    for t, seed, n in np.argwhere(rollout["valid"].numpy()):
        wanted, weight = values[t, seed, n].item(), 1.0
        for u in range(t, 16):
            after = 0.0 if rollout["terminated"][u, seed, n] else 0.9 * values[u + 1, seed, n].item()
            wanted += weight * (rollout["rewards"][u, seed, n].item() / 0.5 + after - values[u, seed, n].item())
            weight *= 0.9 * getattr(args, "gae_lambda", 1.0)
            if rollout["done"][u, seed, n]:
                break
        assert batch["returns"][seed, 3 * t + n].item() == pytest.approx(wanted, abs=1e-4)
        torch.testing.assert_close(batch["obs"][seed, 3 * t + n], obs[seed, 3 * t + n])


@each_on_policy
def test_the_scale_of_rewards_takes_in_the_batch_first(script):
    args = script.Args(num_seeds=2, num_envs=3, num_steps=16)
    agent = script.Agent(*WALKER, args)
    rollout = random_rollout(script, args, 1, 0.3) | {"age": torch.zeros(16, 2, 3)}
    rollout["rewards"] *= 5
    extra = [torch.zeros(2, 2)] if script.__name__ == "reinforce" else []
    first = script.compute_targets(agent, rollout, torch.zeros(2, 3), *extra, args)
    agent.return_stats.count.fill_(1e12)  # the scale stays that of the first time
    again = script.compute_targets(agent, rollout, torch.zeros(2, 3), *extra, args)
    torch.testing.assert_close(first["returns"], again["returns"], rtol=1e-4, atol=1e-5)


@each_on_policy
def test_observations_and_rewards_are_clipped(script):
    args = script.Args(num_envs=4, num_steps=8, gamma=0.0)
    agent = no_values(script.Agent(*WALKER, args))
    agent.return_stats.count.fill_(1e12)  # the scale stays as it is
    agent.return_stats.var.fill_(100.0)
    agent.obs_stats.var.fill_(25.0)
    rollout = random_rollout(script, args) | {"age": torch.zeros(8, 1, 4)}
    rollout |= {name: 100 * rollout[name] for name in ("obs", "rewards")}
    extra = [torch.zeros(1, 2)] if script.__name__ == "reinforce" else []
    batch = script.compute_targets(agent, rollout, torch.zeros(1, 4), *extra, args)
    for ours, raw, scale in (("obs", rollout["obs"][:-1], 5), ("returns", rollout["rewards"], 10)):
        expected = script.seeds_first(raw / scale).clamp(-10, 10)
        torch.testing.assert_close(batch[ours][batch["valid"]], expected[batch["valid"]], rtol=1e-4, atol=1e-4)


@each_on_policy
def test_the_losses_of_a_rollout_are_told_as_they_are(script):
    """The policy's and V's, the explained variance and the entropy, by hand."""
    args = script.Args(num_envs=4, num_steps=8)
    agent, rollout = script.Agent(*WALKER, args), random_rollout(script, args) | {"age": torch.zeros(8, 1, 4)}
    agent.log_std.data.fill_(-0.4)
    extra = [torch.zeros(1, 2)] if script.__name__ == "reinforce" else []
    parts = (rollout, torch.zeros(1, 4), *extra, args)
    batch = script.compute_targets(*copy.deepcopy((agent, *parts)))
    returns = batch["returns"][batch["valid"]]
    error = (returns - agent.critic(batch["obs"]).squeeze(-1)[batch["valid"]]).detach()
    normal = torch.distributions.Normal

    def log_probs():
        own = normal(agent.actor(batch["obs"]), agent.log_std.exp()).log_prob(batch["actions"]).sum(-1)
        return own[batch["valid"]].detach()

    old_log_probs = log_probs()
    still = torch.optim.SGD([parameter for parameter in agent.parameters() if parameter.requires_grad], 0.0)
    if script.__name__ == "ppo_continuous":
        losses = script.update_minibatch(agent, still, batch, torch.zeros(1), args)
        losses |= script.finish_iteration(agent, rollout, batch, torch.zeros(1), args)
    elif script.__name__ == "trpo":
        losses = script.update_critic(agent, still, batch) | script.update_policy(agent, batch, args)
    else:
        losses = script.update(agent, still, *parts)
    share = 1 - (error.var(correction=0) / returns.var(correction=0)).item()
    assert losses["explained_variance"].item() == pytest.approx(share, rel=1e-3, abs=1e-4)
    assert losses["value_loss"].item() == pytest.approx(error.square().mean().item() / 2, rel=1e-4)
    spread = normal(0.0, agent.log_std.detach().exp())  # TRPO's is of the policy after its step, like its policy loss
    assert losses["entropy"].item() == pytest.approx(spread.entropy().sum().item(), rel=1e-5)
    weights = batch["weights" if script.__name__ == "reinforce" else "advantages"][batch["valid"]]
    of_ratio = script.__name__ in ("ppo_continuous", "trpo")
    gains = weights * ((log_probs() - old_log_probs).exp() if of_ratio else old_log_probs)
    rows = batch["valid"].numel() if script.__name__ == "reinforce" else len(gains)
    assert losses["policy_loss"].item() == pytest.approx(-gains.sum().item() / rows, rel=1e-4, abs=1e-6)
    if script.__name__ == "trpo":
        assert losses["step_length"].item() in [pytest.approx(args.line_search_decay**j) for j in range(10)]


def test_curves_are_means_since_the_last_report(script, quick, monkeypatch):
    """Each seed's own, over however many updates, minibatches and epochs there were."""
    names = script.LOSSES
    parts = {"ppo_continuous": {"update_minibatch": names[:5], "finish_iteration": names[5:]}}
    parts["trpo"] = {"update_critic": ["value_loss"], "update_policy": [name for name in names if name != "value_loss"]}
    for part, own in parts.get(script.__name__, {"update": names}).items():
        monkeypatch.setattr(script, part, lambda *_, own=own: {name: torch.tensor([3.0, 4.0]) for name in own})
    total = 640 if script.__name__ in ("ddpg", "sac") else 64 * 250  # so that reports are of several updates
    for k, folder in enumerate(script.train(script.Args(**quick | {"num_seeds": 2, "total_timesteps": total}))):
        events = EventAccumulator(str(folder)).Reload()
        values = [event.value for name in names for event in events.Scalars(f"losses/{name}")]
        assert values == pytest.approx([3.0 + k] * len(values))


def test_an_evaluation_is_of_first_episodes(script, monkeypatch):
    """Environments go on while others are in their first episode; what they earn then does not count."""
    monkeypatch.setattr(script, "make_envs", counting_envs)
    monkeypatch.setattr(Counting, "action_space", gymnasium.spaces.Box(-2, 2, (2,), np.float64))
    action = torch.tensor([0.5, 1.5])
    monkeypatch.setattr(script.Agent, "deterministic_action", lambda self, obs: action.expand(*obs.shape[:2], 2))
    args = script.Args(num_seeds=2, env_id="Counting")
    found = script.evaluate(script.Agent(Counting.observation_space, Counting.action_space, args), args, 3, 0)
    lengths = np.array([[3, 4, 5], [2, 3, 4]])  # 2 + (environment + 1) % 4
    assert (found["length"] == lengths).all()
    assert (found["return"] == lengths * (lengths + 1) / 2).all()
    assert (found["squared_action"] == (0.25 + 2.25) / 2).all()
    assert (found["x_velocity"] == (lengths + 1) / 2).all()  # 1, 2, 3, ... over the episode, and nothing after it


def test_what_follows_a_first_episode_cannot_spoil_its_return(script, monkeypatch):
    class Broken(Counting):
        def step(self, action):
            obs, reward, *ends, _ = super().step(action)
            reward = reward if self.episode == 1 else np.inf
            return obs, reward, *ends, {"x_velocity": reward}

    def broken_envs(args, env_seeds, render_mode=None):
        return gymnasium.vector.SyncVectorEnv([lambda i=i: Broken(i) for i in range(len(env_seeds))])

    monkeypatch.setattr(script, "make_envs", broken_envs)
    args = script.Args(env_id="Broken")
    found = script.evaluate(script.Agent(Counting.observation_space, Counting.action_space, args), args, 4, 0)
    assert found["return"].tolist() == [[6, 10, 15, 3]]  # of 3, 4, 5 and 2 steps
    assert np.isfinite(found["x_velocity"]).all()


class Paying(gymnasium.Env):
    """Episodes of two steps, each of which pays the number of the episode times `pay`."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)

    def __init__(self, pay):
        self.pay, self.episode = pay, 0

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return np.zeros(1), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1), float(self.pay * self.episode), False, self.t == 2, {}


def test_the_returns_that_a_run_reports(script, quick, monkeypatch, capsys):
    def paying_envs(args, env_seeds, render_mode=None):
        pays = np.repeat([1, 2], len(env_seeds) // 2)
        return gymnasium.vector.SyncVectorEnv([lambda pay=pay: Paying(pay) for pay in pays])

    monkeypatch.setattr(script, "make_envs", paying_envs)
    args = script.Args(**quick | {"env_id": "Paying", "num_seeds": 2, "num_envs": 1, "hidden_size": 8})
    for pay, folder in enumerate(script.train(args), 1):
        row = read_metrics(folder)[-1]
        # 640 steps are 213 episodes of two and a reset each; the last 100 are those from 114 on
        assert row["episodic_return"] == f"{2 * pay * np.mean(range(114, 214)):.8g}"
        assert row["eval_return"] == str(2 * pay)
        events = EventAccumulator(str(folder)).Reload()
        assert events.Scalars("charts/episodic_length")[-1].value == 2
        assert [event.value for event in events.Scalars("eval/episodic_return")] == [2 * pay] * 2
    assert "evaluation return 3 (by seed: 2 4)" in capsys.readouterr().out


def test_each_pool_has_its_own_seeds_and_size(script, quick, monkeypatch):
    """Simulators and noise of a resumed run too: it does not play its first episodes again."""
    seen, make_envs, noise = [], script.make_envs, []
    monkeypatch.setattr(script.torch, "manual_seed", noise.append)

    def watched(args, env_seeds, render_mode=None):
        seen.append(env_seeds)
        return make_envs(args, env_seeds, render_mode)

    monkeypatch.setattr(script, "make_envs", watched)
    changes = {"num_seeds": 2, "eval_episodes": 3, "final_eval_episodes": 5, "anneal_lr": False, "save_replay": True}
    changes = {name: value for name, value in changes.items() if hasattr(script.Args, name)}
    args = script.Args(**quick | changes)
    script.train(args)
    script.train(script.Args(**quick | changes | {"total_timesteps": 1280, "resume": "auto"}))
    pools = [(4, 0, 0), (3, 1, 320), (5, 1, 640)]  # training, an evaluation, and the last one
    pools += [(4, 0, 640), (5, 1, 1280)]
    assert noise == [script.spaced_seeds(args, 1, 2, step)[0] for step in (0, 640)]
    assert seen == [script.spaced_seeds(args, number, *stream) for number, *stream in pools]


def test_the_clock_stands_still_while_agents_are_evaluated(script, quick, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    args = script.Args(num_seeds=2, **quick)
    log = script.RunLog(args, torch.device("cpu"), script.claim_folders(args), None)
    now[0] = 4.0
    seconds = log.clock()
    now[0] = 100.0
    log.report(320, seconds, {}, np.ones(2))
    now[0] = 102.0
    log.report(640, log.clock(), {}, None)
    log.close()
    now[0] = 107.0
    script.save_run(args, log, script.Agent(*WALKER, args), {}, 700)
    assert script.load(log.folders[0], "checkpoint")[1]["seconds"] == 6 + 5  # a checkpoint between two reports
    assert [event.value for event in EventAccumulator(str(log.folders[1])).Reload().Scalars("charts/SPS")] == [160, 320]
    rows = [[float(row[name]) for name in ("wall_seconds", "steps_per_second")] for row in read_metrics(log.folders[1])]
    assert rows == [[4, 160], [6, 320]]  # of both seeds together


def test_evaluations_take_no_time_of_a_run(script, quick, monkeypatch):
    clock, evaluate, late = script.time.perf_counter, script.evaluate, [0.0]

    def slow(*parts):
        late[0] += 1e4
        return evaluate(*parts)

    monkeypatch.setattr(script.time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(script, "evaluate", slow)
    (folder,) = script.train(script.Args(**quick))
    assert float(read_metrics(folder)[-1]["wall_seconds"]) < 1e3


def test_a_resumed_log_has_each_point_once_and_remembers_its_episodes(script, quick, monkeypatch):
    args, device = script.Args(**quick), torch.device("cpu")
    folders = script.claim_folders(args)
    saved = {"global_step": 320, "seconds": 1.0, "rows": [["320,1.000,5.000,,1.000"]], "episodes": [[[5.0, 7.0]]]}
    for start, steps in ((None, (320, 640)), (saved, (640,))):  # killed after a checkpoint at step 320
        log = script.RunLog(args, device, folders, start)
        for step in steps:
            log.report(step, log.seconds + 1, {}, None)
        log.close()
    events = EventAccumulator(str(folders[0])).Reload()
    assert [(event.step, event.value) for event in events.Scalars("charts/SPS")] == [(320, 320), (640, 320)]
    for tag, value in (("episodic_return", 5.0), ("episodic_length", 7.0)):
        assert [(event.step, event.value) for event in events.Scalars(f"charts/{tag}")] == [(640, value)]
    assert [row["global_step"] for row in read_metrics(folders[0])] == ["320", "640"]
    script.RunLog(args, device, folders, saved | {"global_step": 640}).close()  # each resumption is remembered
    resumed = json.loads((folders[0] / "config.json").read_text())["resumed"]
    assert [each["at_step"] for each in resumed] == [320, 640]
    assert float(read_metrics(folders[0])[-1]["wall_seconds"]) == 2

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(script.os, "lockf", no_locks)  # as on some file systems
    script.RunLog(args, device, script.claim_folders(args), None).close()


def test_evaluating_an_agent_takes_the_task_that_it_was_trained_on(script, quick):
    (folder,) = script.train(script.Args(**quick | {"env_kwargs": {"max_episode_steps": "3"}}))
    script.evaluate_saved(script.Args(evaluate=str(folder), final_eval_episodes=4))
    with open(folder / "evaluation.csv", newline="") as file:
        assert [float(row["length"]) for row in csv.DictReader(file)] == [3] * 4
    for env_kwargs, length in (({"max_episode_steps": "2"}, 2), ({"reset_noise_scale": "0"}, 3)):  # what is asked for
        script.evaluate_saved(script.Args(evaluate=str(folder), final_eval_episodes=4, env_kwargs=env_kwargs))
        with open(folder / "evaluation.csv", newline="") as file:
            assert [float(row["length"]) for row in csv.DictReader(file)] == [length] * 4


def test_evaluating_an_agent_takes_the_changed_task_and_writes_each_episode(script, quick):
    (folder,) = script.train(script.Args(**quick))
    changed = {"env_kwargs": {"max_episode_steps": "3"}, "final_eval_episodes": 4}
    script.evaluate_saved(script.Args(evaluate=str(folder / "agent.pt"), **changed))
    with open(folder / "evaluation.csv", newline="") as file:
        assert [(float(row["return"]), float(row["length"])) for row in csv.DictReader(file)] == [(3, 3)] * 4


def test_defaults_are_those_of_the_results(script):
    """Of Hopper-v4, which every script has been trained on."""
    paths = (ROOT / "benchmarks" / "results").glob(f"**/{script.__name__}/Hopper-v4/run.json")
    ran = json.loads(next(paths).read_text())["args"]
    of_the_run = {"seed", "num_seeds", "total_timesteps", "env_id", "env_threads", "torch_threads"}
    of_the_run |= {"save_replay", "checkpoint_seconds"}
    assert {name: getattr(script.Args(), name) for name in ran.keys() - of_the_run} == {
        name: value for name, value in ran.items() if name not in of_the_run
    }


def no_values(agent):
    """V = 0: with rewards of 0 there are no advantages then."""
    for parameter in agent.critic.parameters():
        parameter.data.zero_()
    return agent


def descend(script, agent, rollout, args):
    """An update of A2C or REINFORCE, by plain gradient descent."""
    extra = [torch.zeros(1, 2)] if script.__name__ == "reinforce" else []
    rollout = rollout | {"age": torch.zeros_like(rollout["rewards"])}
    script.update(agent, torch.optim.SGD(agent.parameters(), 0.1), rollout, torch.zeros(1, 4), *extra, args)


@pytest.mark.parametrize("coefficient", ["vf_coef", "ent_coef", "bounds_loss_coef"])
@pytest.mark.parametrize("script", ["ppo_continuous", "a2c", "reinforce"], indirect=True)
def test_a_coefficient_weighs_its_loss(script, coefficient):
    """What a step of gradient descent adds to a bias or to log_std, by hand."""
    if not hasattr(script.Args, coefficient):
        pytest.skip("an option that this script does not have")
    of_ppo = {"anneal_log_std": False, "num_minibatches": 1} if script.__name__ == "ppo_continuous" else {}
    ends = []
    for weight in (0.0, 0.3):
        args = script.Args(num_envs=4, num_steps=8, max_grad_norm=1e9, **of_ppo | {coefficient: weight})
        agent, rollout = script.Agent(*WALKER, args), random_rollout(script, args) | {"age": torch.zeros(8, 1, 4)}
        agent.actor[-1].bias.data.fill_(1.5)  # out of bounds
        extra = [torch.zeros(1, 2)] if script.__name__ == "reinforce" else []
        batch = script.compute_targets(*copy.deepcopy((agent, rollout, torch.zeros(1, 4), *extra, args)))
        obs, valid = batch["obs"], batch["valid"]
        error, excess = batch["returns"] - agent.critic(obs)[..., 0], agent.actor(obs) - 1
        share = valid.float().mean() if script.__name__ == "reinforce" else 1.0  # of the rows that divide its bonus
        down = {"vf_coef": error[valid].mean(), "ent_coef": share, "bounds_loss_coef": -2 * excess[valid].mean(0)}
        if of_ppo:
            iteration(script, agent, torch.optim.SGD(agent.parameters(), 0.1), rollout, args, epochs=1)
        else:
            descend(script, agent, rollout, args)
        ends.append(
            {"vf_coef": agent.critic[-1].bias, "ent_coef": agent.log_std}.get(coefficient, agent.actor[-1].bias)
        )
    moved = (ends[1] - ends[0]).flatten()
    torch.testing.assert_close(moved, (0.1 * 0.3 * torch.as_tensor(down[coefficient])).expand_as(moved))


@pytest.mark.parametrize("script", ["a2c", "reinforce"], indirect=True)
def test_an_entropy_bonus_widens_the_policy(script):
    args = script.Args(num_envs=4, num_steps=8, ent_coef=1.0, vf_coef=0.0)
    agent = no_values(script.Agent(*WALKER, args))
    rollout = random_rollout(script, args)
    rollout["rewards"].zero_()
    before = agent.log_std.detach().clone()
    descend(script, agent, rollout, args)
    assert (agent.log_std > before).all()


def test_an_entropy_bonus_widens_ppos_policy(ppo):
    args = ppo.Args(num_envs=4, num_steps=8, num_minibatches=1, anneal_log_std=False, ent_coef=1.0, vf_coef=0.0)
    agent = no_values(ppo.Agent(*WALKER, args))
    rollout, before = random_rollout(ppo, args), agent.log_std.detach().clone()
    rollout["rewards"].zero_()
    iteration(ppo, agent, torch.optim.SGD(agent.parameters(), 0.1), rollout, args, epochs=1)
    assert (agent.log_std > before).all()


@pytest.mark.parametrize("script", ["a2c", "reinforce"], indirect=True)
def test_the_standard_deviation_stays_above_its_floor(script):
    for floor in (-1.0, -9.0):
        args = script.Args(num_envs=4, num_steps=8, log_std_init=-1.0, log_std_min=floor)
        agent = no_values(script.Agent(*WALKER, args))
        rollout = random_rollout(script, args)
        rollout["actions"] *= 0.01  # near the mean, and rewarded: a narrower policy explains them better
        rollout["rewards"] = rollout["valid"].float()
        descend(script, agent, rollout, args)
        assert (agent.log_std >= -1.0).all() if floor == -1.0 else (agent.log_std < -1.0).any()


def test_sac_learns_at_the_rate_asked_for(sac, quick, monkeypatch):
    seen, update = [], sac.update
    monkeypatch.setattr(sac, "update", lambda *parts: seen.append(parts) or update(*parts))
    sac.train(sac.Args(**quick | {"learning_rate": 2e-4}))
    assert [adam.param_groups[0]["lr"] for adam in seen[0][4:6]] == [2e-4] * 2


def test_the_critic_has_its_own_learning_rate(ddpg, quick, monkeypatch):
    seen, update = [], ddpg.update

    def watched(*parts):
        seen.append(parts)
        return update(*parts)

    monkeypatch.setattr(ddpg, "update", watched)
    ddpg.train(ddpg.Args(**quick | {"learning_rate": 1e-4, "critic_learning_rate": 5e-3}))
    agent, critic, _, _, actor_adam, critic_adam = seen[0][:6]
    for network, adam, rate in ((agent, actor_adam, 1e-4), (critic, critic_adam, 5e-3)):
        assert adam.param_groups[0]["lr"] == rate
        assert adam.param_groups[0]["params"][0] is next(network.parameters())


@pytest.mark.parametrize("script", ["ddpg", "sac"], indirect=True)
def test_random_actions_fill_a_range_that_is_not_symmetric(script):
    agent = script.Agent(WALKER[0], gymnasium.spaces.Box(-1, 3, (2,)), script.Args(num_seeds=2))
    actions = agent.random_action(torch.zeros(2, 5000, 5))
    assert -1 <= actions.min() < -0.99
    assert 2.99 < actions.max() <= 3
    assert (actions.mean(1) - 1).abs().max() < 0.1
    assert not torch.equal(actions[0], actions[1])
    middle = agent.deterministic_action(torch.zeros(2, 4, 5))  # of a network without biases yet
    torch.testing.assert_close(middle, torch.ones(2, 4, 2))
    if script.__name__ == "ddpg":
        agent.exploration_noise = 2.0
        explored = agent.exploration_action(torch.zeros(2, 5000, 5))
        assert (explored.min().item(), explored.max().item()) == (-1, 3)
    agent.actor[-1].bias.data[..., :2] = 0.8  # of the mean
    squashed = agent.deterministic_action(torch.zeros(2, 4, 5))
    torch.testing.assert_close(squashed, torch.full((2, 4, 2), 1 + 2 * np.tanh(0.8)))
