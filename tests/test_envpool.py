"""What the scripts rely on in EnvPool, so that an upgrade which changes it fails here and not in a learning curve."""

import envpool
import gymnasium
import numpy as np
import pytest


def make(env_id, num_envs, **kwargs):
    return envpool.make(env_id, "gymnasium", num_envs=num_envs, num_threads=2, **kwargs)


def test_reset_comes_one_step_after_the_end_of_an_episode():
    envs = make("Walker2d-v4", 8, seed=3)
    last_obs, _ = envs.reset()
    rng, done, resets = np.random.default_rng(0), np.zeros(8, bool), 0
    for _ in range(200):
        obs, rewards, terminated, truncated, info = envs.step(rng.uniform(-1, 1, (8, 6)).astype(np.float32))
        assert (info["elapsed_step"][done] == 0).all()
        assert (info["elapsed_step"][~done] > 0).all()
        assert (rewards[done] == 0).all()
        assert not (terminated | truncated)[done].any()
        # the first observation of an episode is near the standing pose, the last one of a fall is not
        assert (np.abs(obs[done, 0] - 1.25) < 0.01).all()
        fell = terminated & ~done
        assert ((obs[fell, 0] < 0.8) | (np.abs(obs[fell, 1]) > 1.0) | (obs[fell, 0] > 2.0)).all()
        resets += done.sum()
        done, last_obs = terminated | truncated, obs
    assert resets > 10
    assert last_obs.dtype == np.float64


def test_the_action_of_a_reset_row_is_ignored():
    trajectories = []
    for filler in (-1.0, 1.0):
        envs = make("Hopper-v4", 2, seed=5)
        envs.reset()
        rng, done, seen = np.random.default_rng(1), np.zeros(2, bool), []
        for _ in range(150):
            actions = rng.uniform(-1, 1, (2, 3))
            actions[done] = filler
            obs, _, terminated, truncated, _ = envs.step(actions)
            done = terminated | truncated
            seen.append(obs)
        trajectories.append(np.array(seen))
    assert np.array_equal(*trajectories)


def test_time_limit_is_a_truncation_with_the_true_last_observation():
    envs = make("HalfCheetah-v4", 1, seed=1, max_episode_steps=5)
    longer = make("HalfCheetah-v4", 1, seed=1, max_episode_steps=50)
    envs.reset()
    longer.reset()
    for t in range(5):
        obs, _, terminated, truncated, _ = envs.step(np.full((1, 6), 0.3))
        expected, *_ = longer.step(np.full((1, 6), 0.3))
        assert np.array_equal(obs, expected)
        assert not terminated[0]
        assert truncated[0] == (t == 4)


def test_a_fall_at_the_time_limit_is_a_truncation_only():
    """So a value is bootstrapped from the fallen state; algos/README.md says so."""

    def ends(**limit):
        envs, step = make("Hopper-v4", 1, seed=1, **limit), 0
        envs.reset()
        while True:
            step += 1
            _, _, terminated, truncated, _ = envs.step(np.zeros((1, 3)))
            if terminated[0] or truncated[0]:
                return step, bool(terminated[0]), bool(truncated[0])

    fall, *kind = ends()
    assert fall < 1000
    assert kind == [True, False]
    assert ends(max_episode_steps=fall) == (fall, False, True)


def test_returned_arrays_are_not_overwritten():
    envs = make("Hopper-v4", 3, seed=1)
    obs, _ = envs.reset()
    kept = obs.copy()
    for _ in range(5):
        envs.step(np.zeros((3, 3)))
    assert np.array_equal(obs, kept)


def test_environment_seeds_are_those_given_and_one_apart_by_default():
    first = make("Hopper-v4", 2, seed=10).reset()[0]
    second = make("Hopper-v4", 2, seed=11).reset()[0]
    assert np.array_equal(first[1], second[0])  # why runs with neighbouring seeds need spaced seeds
    given = make("Hopper-v4", 2, env_seed=[11, 10]).reset()[0]
    assert np.array_equal(given, first[::-1])


def test_neighbouring_seeds_and_streams_share_no_environment(script):
    args = script.Args(seed=1, num_seeds=8, env_id="CartPole-v1")
    streams = [script.spaced_seeds(args, 64, *stream) for stream in ((0, 0), (0, 2048), (1, 2048), (1, 4096))]
    everything = np.concatenate(streams)
    assert everything.dtype.kind == "i"
    assert everything.min() >= 0
    assert everything.max() < 2**31
    assert len(set(everything.tolist())) == 4 * 8 * 64
    alone = script.spaced_seeds(script.Args(seed=3, env_id="CartPole-v1"), 64, 0, 0)
    assert alone == streams[0][2 * 64 : 3 * 64]


def test_task_settings_reach_the_simulator(script):
    def rewards(**env_kwargs):
        args = script.Args(env_id="Walker2d-v4", env_kwargs=env_kwargs)
        envs = script.make_envs(args, [7, 8])
        envs.reset()
        return np.array([envs.step(np.full((2, 6), 0.5))[1] for _ in range(20)]), envs

    usual, _ = rewards()
    backwards, envs = rewards(forward_reward_weight="-1", ctrl_cost_weight="0.5", terminate_when_unhealthy="false")
    velocity = envs.step(np.full((2, 6), 0.5))[4]["x_velocity"]
    assert velocity.shape == (2,)
    control = (0.5 - 0.001) * 6 * 0.25
    healthy = 1.0
    assert backwards == pytest.approx(2 * healthy - usual - control - 2 * 0.001 * 6 * 0.25, abs=1e-4)


def test_states_are_those_of_gymnasium():
    rng = np.random.default_rng(0)
    ours = make("Walker2d-v4", 1, seed=4)
    (obs,), info = ours.reset()
    theirs = gymnasium.make("Walker2d-v4").unwrapped
    theirs.reset()
    theirs.set_state(np.concatenate([info["x_position"], obs[:8]]), obs[8:])
    for _ in range(100):
        action = rng.uniform(-1, 1, 6)
        obs, reward, terminated, _, _ = ours.step(action[None])
        expected, expected_reward, expected_terminated, _, _ = theirs.step(action)
        assert obs[0] == pytest.approx(expected, abs=1e-9)
        assert reward[0] == pytest.approx(expected_reward, rel=1e-5, abs=1e-6)
        assert terminated[0] == expected_terminated
        if terminated[0]:
            break
