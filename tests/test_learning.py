"""Learning, not only running: small tasks solved within a fixed number of steps."""

import pytest
from conftest import ROOT, load_script
from test_runs import read_metrics


def final_returns(script, tmp_path, **arguments):
    arguments |= {"device": "cpu", "run_dir": str(tmp_path)}  # whose random numbers the thresholds were met with
    folders = script.train(script.Args(num_evaluations=1, final_eval_episodes=20, **arguments))
    return [float(read_metrics(folder)[-1]["eval_return"]) for folder in folders]


def test_ppo_balances_the_pendulum(ppo, tmp_path):
    returns = final_returns(ppo, tmp_path, env_id="InvertedPendulum-v4", num_seeds=2, total_timesteps=100_000)
    assert min(returns) == 1000


def test_ppo_swings_up_a_task_whose_bounds_are_not_1(ppo, tmp_path):
    returns = final_returns(
        ppo, tmp_path, env_id="Pendulum-v1", num_seeds=2, total_timesteps=200_000, gamma=0.9, learning_rate=1e-3
    )
    assert min(returns) > -250


def test_ppo_with_the_kl_penalty_balances_the_pendulum(ppo, tmp_path):
    returns = final_returns(ppo, tmp_path, env_id="InvertedPendulum-v4", total_timesteps=100_000, kl_coef=1.0)
    assert min(returns) > 900


# One thread: pytest's other processes want the cores as well
SMALL = {"torch_threads": 1, "num_envs": 4, "learning_starts": 1000, "learning_rate": 1e-3, "hidden_size": 64}


@pytest.mark.parametrize("stem", ["ddpg", "sac"])
def test_off_policy_swings_up_a_task_whose_bounds_are_not_1(stem, tmp_path):
    script = load_script(ROOT / "algos" / f"{stem}.py")
    returns = final_returns(script, tmp_path, env_id="Pendulum-v1", total_timesteps=15_000, **SMALL)
    assert min(returns) > -250


def test_sac_balances_the_pendulum(sac, tmp_path):
    returns = final_returns(sac, tmp_path, env_id="InvertedPendulum-v4", total_timesteps=16_000, **SMALL)
    assert min(returns) == 1000
