"""Scripts that share no import stay alike by this test."""

import ast
import dataclasses
import itertools
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, load_script
from sync import definitions, surroundings

SOURCES = {path.stem: path.read_text() for path in SCRIPTS}
SECTIONS = ["Networks", "Algorithm", "Training", "Bad input", "Environment", "Logging", "Checkpoint", "Evaluation"]
SECTIONS += ["CUDA graph"]
COMMON_ARGS = {
    "exp_name", "seed", "num_seeds", "total_timesteps", "device", "resume", "evaluate", "env_id", "env_kwargs",
    "env_threads", "cuda_graphs", "compile", "run_dir", "num_evaluations", "eval_episodes",
    "final_eval_episodes", "checkpoint_seconds", "capture_video",
}  # fmt: skip

# Names that differ from script to script, and why.
MAY_DIFFER = {
    "Args": "each algorithm has its own arguments",
    "Agent": "its own networks",
    "sum_rows": "PPO's goes over the rows of all ranks",
    "compute_targets": "REINFORCE has baselines where A2C and TRPO have advantages, and PPO keeps the old policy",
    "update": "the algorithm itself",
    "train": "and its own loop",
}


def test_same_name_same_text():
    texts = {}
    for stem, source in SOURCES.items():
        for name, text in definitions(source).items():
            texts.setdefault(name, {})[stem] = text
    differing = {name for name, copies in texts.items() if len(set(copies.values())) > 1}
    assert differing <= set(MAY_DIFFER), "python tests/sync.py NAME --from FILE rewrites the copies"
    if len(SOURCES) > 1:
        assert set(MAY_DIFFER) <= differing, "an exception that is no longer one"


def test_agents_of_one_kind_have_the_same_methods():
    """Agent may differ, but not between A2C, TRPO and REINFORCE, but for TRPO's vectors of parameters."""

    def methods(stem):
        agent = next(node for node in ast.parse(SOURCES[stem]).body if getattr(node, "name", "") == "Agent")
        return {node.name: ast.unparse(node) for node in agent.body if isinstance(node, ast.FunctionDef)}

    a2c, trpo, reinforce, ppo, sac, ddpg = map(methods, ("a2c", "trpo", "reinforce", "ppo_continuous", "sac", "ddpg"))
    for name in ("__init__", "normalize", "policy", "to_task", "deterministic_action"):
        assert a2c[name] == trpo[name] == reinforce[name]
    assert ppo["normalize"] == a2c["normalize"]
    assert sac["random_action"] == ddpg["random_action"]
    assert definitions(SOURCES["a2c"])["compute_targets"] == definitions(SOURCES["trpo"])["compute_targets"]


def test_surroundings_are_the_same_text():
    assert len({surroundings(source) for source in SOURCES.values()}) == 1


@pytest.mark.parametrize("stem", SOURCES)
def test_sections_stand_in_the_same_order(stem):
    assert re.findall(r"^# -{80,} (.+)$", SOURCES[stem], re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("stem", SOURCES)
def test_every_argument_is_read_and_explained(stem):
    tree = ast.parse(SOURCES[stem])
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            assert node.target.id in read, f"--{node.target.id} is declared and never read"
            assert "  # " in SOURCES[stem].splitlines()[node.lineno - 1], f"--{node.target.id} has no help"


def test_every_curve_is_explained(script):
    text = (ROOT / "algos" / "README.md").read_text()
    assert [name for name in script.LOSSES if f"`losses/{name}`" not in text] == []


def test_the_equation_and_the_function_that_the_readme_shows():
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    lines = [line.removeprefix("#") for line in code.splitlines() if line]
    assert len(lines) == 4
    assert [line for line in lines if line not in SOURCES["ppo_continuous"].splitlines()] == []


def test_common_arguments_are_the_same_everywhere():
    described = []
    for stem, source in SOURCES.items():
        lines = {line.split(":")[0].strip(): line for line in definitions(source)["Args"].splitlines()}
        described.append({name: lines[name] for name in COMMON_ARGS})
        declared = [field.name for field in dataclasses.fields(load_script(ROOT / "algos" / f"{stem}.py").Args)]
        assert set(declared) >= COMMON_ARGS
    assert all(first == second for first, second in itertools.pairwise(described))


@pytest.mark.parametrize("stem", SOURCES)
def test_a_script_needs_no_file_but_itself(stem):
    local = {path.stem for folder in ("algos", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py")}
    for node in ast.walk(ast.parse(SOURCES[stem])):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {module.split(".")[0] for module in modules} & local


@pytest.mark.parametrize("stem", SOURCES)
def test_inline_metadata_names_what_is_imported(stem):
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SOURCES[stem])
    assert block, "PEP 723 metadata comes first"
    assert all(source.startswith(block.group()) for source in SOURCES.values())
    nodes = [node for node in ast.parse(SOURCES[stem]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) for node in nodes}
    assert "torch.utils.tensorboard" in modules  # which needs tensorboard
    third_party = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    for module in third_party - {"numpy"} | {"tensorboard"}:  # numpy comes with EnvPool
        assert f'"{module}' in block.group(1), module


def test_sync_rewrites_copies(tmp_path):
    """The tool, on a copy of the folder in which a script has drifted."""
    for folder in ("algos", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "sync.py").write_text((ROOT / "tests" / "sync.py").read_text())
    source = SOURCES["ppo_continuous"]
    (tmp_path / "algos" / "a.py").write_text(source)
    drifted = source.replace("def masked_mean(x: Tensor", "def masked_mean(y: Tensor").replace(
        "for k, folder", "for j, folder"
    )
    assert drifted != source
    (tmp_path / "algos" / "b.py").write_text(drifted)
    for name in ("masked_mean", "surroundings"):
        words = [sys.executable, str(tmp_path / "tests" / "sync.py"), name, "--from", str(tmp_path / "algos" / "a.py")]
        assert f"b.py: {name} rewritten" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "algos" / "b.py").read_text() == source
