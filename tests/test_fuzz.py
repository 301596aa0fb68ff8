"""Random command lines, a value for every argument: each trains, or ends with a message; nothing breaks or hangs."""

import dataclasses
import itertools
import subprocess
import sys
import typing

import envpool
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

TASKS = ["InvertedPendulum-v4", "CartPole-v1", "Pendulum-v1", "Hopper-v4", "Acrobot-v1", "LunarLanderContinuous-v3"]
# Several players, dictionaries, libraries and files that are not there, ...
ODD_TASKS = [
    "WalkerWalk-v1",
    "Chess-v1",
    "IntersectionMultiAgent-v0",
    "BigfishEasy-v0",
    "VizdoomCustom-v1",
    "Sudoku-v0",
]
ODD_TASKS += ["FrozenLake-v1", "Blackjack-v1", "Taxi-v3", "Pong-v5", "MyoHandAirplaneFixed-v0", "Walker2d", ""]
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
TEXTS |= st.sampled_from(["", " ", ".", "..", "../x", "a/b", "[a]*?", "x" * 300, "-1", "--help", "\n", "é", "auto"])

# What costs little and makes sense. A type's own values stand below for the fields that are not named here.
SANE = {
    "exp_name": st.sampled_from(["a", "[b]", "c d", "é"]),
    "seed": st.integers(0, 2**32 - 1),
    "num_seeds": st.integers(1, 3),
    "total_timesteps": st.integers(60, 400),
    "device": st.sampled_from(["cpu", "auto", "cpu:0"]),
    "resume": st.sampled_from([None, "auto"]),
    "evaluate": st.none(),
    "env_id": st.sampled_from(TASKS),
    "env_kwargs": st.just({}) | st.integers(5, 50).map(lambda limit: {"max_episode_steps": str(limit)}),
    "num_envs": st.integers(1, 6),
    "num_steps": st.integers(1, 16),
    "horizon": st.integers(1, 40),
    "num_minibatches": st.sampled_from([1, 1, 2, 5]),  # what does not divide is refused
    "baseline": st.sampled_from(["none", "mean", "value"]),
    "optimizer": st.sampled_from(["rmsprop", "adam"]),
    "gamma": st.floats(0, 1),
    "gae_lambda": st.floats(0, 1),
    "tau": st.floats(0, 1),
    "ent_coef": st.just(0.0) | st.floats(0, 2),  # PPO refuses a bonus that an annealed deviation cannot feel
    "utd_ratio": st.floats(0.1, 2),  # of less nothing may be learned, which is refused
    "learning_starts": st.integers(1, 50),
    "buffer_size": st.integers(6, 500),
    "log_std_init": st.floats(-3, 1),
    "log_std_min": st.floats(-5, -3),  # at most the first one
    "torch_threads": st.integers(0, 3),
    "env_threads": st.integers(0, 3),
    "compile": st.just(False),  # takes minutes
    "capture_video": st.none(),
    "line_search_steps": st.integers(0, 4),
    "hidden_size": st.integers(0, 8),
    "num_evaluations": st.integers(0, 4),
}
SANE_TYPES = {int: st.integers(1, 8), float: st.floats(0, 2), bool: st.booleans()}

# What does not: of every size and sign, NaN, text. No size is both allowed and more work than a test can wait for.
WILD = {
    "total_timesteps": st.sampled_from([-1, 0, 1, 7, 2**63, 10**30]),
    "device": TEXTS | st.sampled_from(["cuda:99", "cpu:7", "meta", "hpu", "privateuseone", "mkldnn", "xla", "cuda:-1"]),
    "env_id": TEXTS | st.sampled_from(ODD_TASKS) | st.sampled_from(envpool.list_all_envs()),
    "env_kwargs": st.dictionaries(
        TEXTS | st.sampled_from(["max_episode_steps", "frame_skip", "xml_file", "reset_noise_scale", "num_envs"]),
        TEXTS | st.sampled_from(["0", "-1", "nan", "inf", "1e308", "2147483648", "true"]),
        max_size=2,
    ),
    "run_dir": st.sampled_from(["", "/proc/nowhere", "/dev/null", "x" * 300]),
    "evaluate": TEXTS | st.sampled_from(["/", "/dev/null", "/proc/self/mem", "x" * 5000]),
    "resume": TEXTS | st.sampled_from(["/", "/dev/null", "/proc/self/mem", "x" * 5000]),
    "capture_video": TEXTS | st.sampled_from(["gif", "mp4"]),
    "baseline": TEXTS,
    "optimizer": TEXTS,
    "compile": st.just(False),
    "num_evaluations": st.sampled_from([-1, 0, 2**20, 2**21, 2**63]),
    "learning_starts": st.sampled_from([-1, 0, 1000, 2**53, 2**63]),
    "buffer_size": st.sampled_from([-1, 0, 1, 2**45, 2**53, 2**63]),
}
WILD_TYPES = {
    int: st.sampled_from([-(2**63), -1, 0, 2**21, 2**31, 2**63, 10**30]),
    float: st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.0, -99.0, 0.0, 1e-320, 1e15, 1e30, 1e308])
    | st.floats(),
    bool: st.booleans(),
    str: TEXTS,
}


@st.composite
def command_lines(draw, script, run_dir):
    """A value for every argument of the script; in half of the command lines one to three of them are wild."""
    fields = {field.name: typing.get_type_hints(script.Args)[field.name] for field in dataclasses.fields(script.Args)}
    fields.pop("world_size", None)  # not an option: torchrun sets it
    wild = draw(st.just(set()) | st.sets(st.sampled_from(list(fields)), min_size=1, max_size=3))
    words = []
    for name, kind in fields.items():
        if name == "run_dir" and name not in wild:
            words += ["--run-dir", str(run_dir)]
            continue
        optional = typing.get_args(kind) if type(None) in typing.get_args(kind) else ()
        kind = optional[0] if optional else kind
        own, types = (WILD, WILD_TYPES) if name in wild else (SANE, SANE_TYPES)
        value = draw(own[name] if name in own else types[kind])
        if optional and name not in wild and draw(st.booleans()):
            value = None
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            words.append(option if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, dict):
            words += [option, *(word for pair in value.items() for word in pair)] if value else []
        elif value is not None:
            words += [option, str(value)]
    assume("--help" not in words)
    return words


def check(status, out, error):
    """Trained; or one that diverged, said so; or refused, in a line of the script's or a message of the parser's."""
    assert "Traceback" not in error, error
    assert status in (0, 1, 2), (status, error)
    if status == 0:
        assert "steps of" in out
    if status == 1:
        assert "diverged: seeds" in out
    if status == 2:
        lines = [line for line in error.splitlines() if ".py: error: " in line]
        assert len(lines) == 1 or "─" in error or "Parsing error" in error, error


def fuzz(script, launcher, run_dir, examples):
    statuses = []

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(command_lines(script, run_dir))
    def each(words):
        result = launcher.run(script, words, seconds=300)
        check(*result)
        if result[0] == 0:  # what a script has written, it can read, and then nothing is left to do
            resume = ["--resume", "auto"]
            again = launcher.run(script, words if tuple(resume) in itertools.pairwise(words) else words + resume)
            assert again[0] == 0, again
            assert again[1].split("\n")[1] == result[1].split("\n")[1]  # in the same folder
        statuses.append(result[0])

    each()
    return statuses


def test_random_command_lines(script, launcher, tmp_path):
    statuses = fuzz(script, launcher, tmp_path, 25)
    assert statuses.count(0) >= 3  # some of them train
    assert statuses.count(2) >= 3


@pytest.mark.slow
def test_more_random_command_lines(script, launcher, tmp_path):
    fuzz(script, launcher, tmp_path, 400)


@pytest.mark.slow
def test_every_kind_of_task_trains_or_is_refused(a2c, sac, launcher, tmp_path):
    """One task of each kind that EnvPool has."""
    kinds = {}
    for task in envpool.list_all_envs():
        try:
            kinds.setdefault(type(envpool.make_spec(task)).__name__, task)
        except Exception as error:  # its libraries are not there
            kinds.setdefault(repr(error)[:40], task)
    kinds.pop("VizdoomEnvSpec")  # its games race for a folder of their own, and now and then that ends the process
    words = ["--num-envs", "2", "--env-threads", "1", "--num-evaluations", "1", "--final-eval-episodes", "1"]
    words += ["--hidden-size", "8", "--run-dir", str(tmp_path), "--env-kwargs", "max_episode_steps", "20", "--env-id"]
    for task in kinds.values():
        check(*launcher.run(a2c, ["--num-steps", "8", "--total-timesteps", "64", *words, task]))
        check(*launcher.run(sac, ["--learning-starts", "20", "--total-timesteps", "40", *words, task]))


def test_a_process_of_its_own_ends_alike(a2c, launcher, tmp_path):
    """That the forked processes of these tests tell what a command line would."""
    small = ["--env-id", "CartPole-v1", "--total-timesteps", "64", "--num-envs", "2", "--final-eval-episodes", "1"]
    cases = [[], ["--learning-rate", "1e15"], ["--num-envs", "2000000000"], ["--hidden-size", "1000000"], ["--gamma"]]
    for number, words in enumerate(cases):
        words = [*small, *words, "--run-dir", str(tmp_path / str(number))]
        status, *texts = launcher.run(a2c, words)
        check(status, *texts)
        alone = subprocess.run([sys.executable, a2c.__file__, *words], capture_output=True, text=True)
        check(alone.returncode, alone.stdout, alone.stderr)
        assert alone.returncode == status
