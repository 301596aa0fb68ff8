"""What the tests share: every script of algos/ loaded as a module, and small arguments for a quick run."""

import importlib.util
import json
import os
import signal
import subprocess
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


@pytest.fixture(params=[path.stem for path in SCRIPTS])
def script(request):
    """Each script in turn, or those that a test names, as a module."""
    return load_script(ROOT / "algos" / f"{request.param}.py")


@pytest.fixture(autouse=True)
def processor():
    """Training sets both, for the whole process; Hypothesis wants all the numbers that there are."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


def fixture_of(stem):
    return pytest.fixture(lambda: load_script(ROOT / "algos" / f"{stem}.py"))


ppo, a2c, trpo, reinforce, ddpg, sac = map(fixture_of, ("ppo_continuous", "a2c", "trpo", "reinforce", "ddpg", "sac"))


class Launcher:
    """Command lines of the scripts, each run by the script's own `main` in a process of its own. A process that has
    imported everything is forked, which takes milliseconds where a start takes seconds."""

    SOURCE = """
import json, os, resource, sys
import conftest, torch._dynamo, test_faults
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if order["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
        script = sys.modules[order["script"]]
        if order["make_envs"]:
            script.make_envs = getattr(test_faults, order["make_envs"])
        sys.argv = [script.__file__, *order["words"]]
        status = 70
        try:
            script.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self, folder):
        self.out, self.err = folder / "stdout", folder / "stderr"
        places = [str(Path(place).resolve()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
        places.append(str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # A process that has asked for CUDA in the common way cannot be forked any more
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )  # fmt: skip

    def start(self, script, words, file_size=0, make_envs=None):
        """The number of the process."""
        order = {"script": script.__name__, "words": list(map(str, words)), "file_size": file_size}
        order |= {"make_envs": make_envs, "out": str(self.out), "err": str(self.err)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit status of the process, minus the number of the signal if one ended it, and what it printed."""
        status = int(self.process.stdout.readline())
        return status, self.out.read_text(errors="replace"), self.err.read_text(errors="replace")

    def run(self, script, words, seconds=120, **how):
        """Like `wait`; a process that has not ended after so many seconds is killed, which its status tells."""
        pid = self.start(script, words, **how)
        deadline = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {pid}"], process_group=0)
        try:
            return self.wait()
        finally:
            os.killpg(deadline.pid, signal.SIGKILL)
            deadline.wait()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait()


@pytest.fixture
def quick(request, tmp_path):
    """Arguments, as far as the script has them, of a run of ten iterations in a temporary folder."""
    names = [
        name for name in ("script", "ppo", "a2c", "trpo", "reinforce", "ddpg", "sac") if name in request.fixturenames
    ]
    script = request.getfixturevalue(names[0])
    everything = {
        "device": "cpu",
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
        "torch_threads": 1,
        "run_dir": str(tmp_path / "runs"),
    }
    return {name: value for name, value in everything.items() if name in script.Args.__dataclass_fields__}
