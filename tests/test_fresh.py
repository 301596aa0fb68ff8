"""On a machine that has nothing but Python: the README's two commands, and one script copied alone."""

import re
import shutil
import subprocess
import tomllib

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # each installs torch anew
PARTS = ("algos", "benchmarks", "tests", "README.md", "requirements.txt", ".pytest.ini", ".ruff.toml")


@pytest.fixture(params=["3.11", "3.12", "3.13"])
def fresh(request, tmp_path):
    """A shell command's runner, in an empty folder and a new virtual environment of each Python that is installed."""
    python = shutil.which(f"python{request.param}")
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"Python {request.param} is not installed")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(line):
        done = subprocess.run(
            ["bash", "-c", f". {tmp_path}/venv/bin/activate && {line}"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])

    run.folder = folder
    return run


def test_the_two_commands_of_the_readme(fresh):
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, fresh.folder / part)
    commands = re.search(r"```sh\n(.+)\n(.+)\n```", (ROOT / "README.md").read_text()).groups()
    assert all(command.startswith("pip install -r requirements.txt && python ") for command in commands)
    fresh(commands[0] + " --total-timesteps 20480 --final-eval-episodes 10")
    assert list(fresh.folder.glob("runs/*/agent.pt"))
    fresh(commands[1])


def test_one_script_with_nothing_but_its_own_dependencies(fresh, sac):
    text = (ROOT / "algos" / "sac.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)[1]
    wanted = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))["dependencies"]
    (fresh.folder / "sac.py").write_text(text)
    fresh("pip install -q " + " ".join(f"'{name}'" for name in wanted))
    fresh("python sac.py --env-id Pendulum-v1 --total-timesteps 800 --learning-starts 400 --final-eval-episodes 4")
    assert list(fresh.folder.glob("runs/*/agent.pt"))
