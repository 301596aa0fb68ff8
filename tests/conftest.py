"""What the tests share: every script of algos/ loaded as a module, and small arguments for a quick run."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "algos").glob("*.py"))


def load_script(path):
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


for each in SCRIPTS:  # before a test imports EnvPool: what films needs is loaded first (see the scripts' imports)
    load_script(each)


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request):
    """Each script in turn, as a module."""
    return load_script(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def fixture_of(stem):
    return pytest.fixture(lambda: load_script(ROOT / "algos" / f"{stem}.py"))


ppo, a2c, trpo, reinforce, ddpg, sac = map(fixture_of, ("ppo_continuous", "a2c", "trpo", "reinforce", "ddpg", "sac"))


@pytest.fixture
def quick(request, tmp_path):
    """Arguments, as far as the script has them, of a run of ten iterations in a temporary folder."""
    names = [
        name for name in ("script", "ppo", "a2c", "trpo", "reinforce", "ddpg", "sac") if name in request.fixturenames
    ]
    script = request.getfixturevalue(names[0])
    everything = {
        "env_id": "InvertedPendulum-v4",
        "num_envs": 4,
        "num_steps": 16,
        "horizon": 50,
        "num_minibatches": 4,
        "update_epochs": 2,
        "value_epochs": 2,
        "batch_size": 16,
        "learning_starts": 64,
        "buffer_size": 1000,
        "total_timesteps": 640,
        "num_evaluations": 2,
        "eval_episodes": 2,
        "final_eval_episodes": 2,
        "env_threads": 2,
        "run_dir": str(tmp_path / "runs"),
    }
    return {name: value for name, value in everything.items() if name in script.Args.__dataclass_fields__}
