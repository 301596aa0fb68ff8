"""On an emulated CUDA device (emulator.py): what the scripts do with graphs, pinned memory and waiting is right. Where
there is a real one, test_cuda.py checks it there."""

import contextlib

import pytest
import torch
from test_cuda import OTHER_SETTINGS, final_state, loss_curves
from test_runs import without_clock

if torch.cuda.is_available():
    pytest.skip("PyTorch takes one device for its accelerator", allow_module_level=True)

from emulator import Emulation, load_emulated

RARE_REPORTS = (", 100, last)", ", 1, last)")  # each has the host wait, which could hide that it must wait elsewhere


@pytest.fixture
def quick(quick):
    return quick | {"num_seeds": 2, "total_timesteps": 320}


def check_emulated_equals_cpu(script, args, changes=(), resume=False):
    """Random numbers are the same on both, so that all numbers are."""
    usual, changed = (load_emulated(script.__file__, [RARE_REPORTS, *more]) for more in ((), changes))
    found = []
    for module, device in ((usual, "cpu"), (changed, "emulated")):
        with Emulation() if device == "emulated" else contextlib.nullcontext():
            folders = module.train(module.Args(**args | {"device": device}))
            if resume:
                more = {"device": device, "resume": str(folders[0]), "total_timesteps": 2 * args["total_timesteps"]}
                module.train(module.Args(**args | more))
        found.append((final_state(folders), [without_clock(folder) for folder in folders], loss_curves(folders)))
    (state, metrics, curves), (emulated_state, emulated_metrics, emulated_curves) = found
    torch.testing.assert_close(emulated_state, state, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(emulated_curves, curves, rtol=1e-3, atol=1e-4)
    if "optimizer" not in args:  # RMSprop has another order of operations on CUDA
        assert emulated_metrics == metrics


@pytest.mark.parametrize(("script", "settings"), OTHER_SETTINGS, ids=str, indirect=["script"])
def test_graphs_equal_the_cpu_with_other_settings(script, settings, quick):
    check_emulated_equals_cpu(script, quick | settings)


def test_graphs_equal_the_cpu_after_resume(script, quick):
    more = {"save_replay": True} if script.__name__ == "sac" else {}
    check_emulated_equals_cpu(script, quick | more, resume=True)


@pytest.mark.parametrize("script", ["ppo_continuous", "ddpg"], indirect=True)
def test_no_graphs_equal_the_cpu(script, quick, monkeypatch):
    monkeypatch.setattr(torch.emulated, "CUDAGraph", None)  # none is recorded
    check_emulated_equals_cpu(script, quick | {"cuda_graphs": False})


def test_auto_takes_the_device(script):
    with Emulation():
        module = load_emulated(script.__file__)
        assert module.select_device(module.Args(device="auto")).type == "emulated"


WAIT = "torch.cuda.current_stream(device).synchronize()"
STREAMS = "    stream.wait_stream(torch.cuda.current_stream(device))\n"
STREAMS = STREAMS, "    torch.cuda.current_stream(device).wait_stream(stream)\n"
NEW_LOSSES = "losses = {name: torch.zeros_like(total) for name, total in losses.items()}"
FAULTS = [  # what the code says, what it says then, what comes of it
    ("ppo_continuous", WAIT, "pass", "has written to pinned memory"),
    ("sac", WAIT, "pass", "has written to pinned memory"),
    ("ddpg", "critic_loss.sum()", "(critic_loss[0].item() * critic_loss).sum()", "capturing: aten::_local_scalar"),
    ("sac", "rewards + gamma", "torch.tensor(0.0, device=rewards.device) + rewards + gamma", "capturing: copy to"),
    ("ddpg", "self.count += valid", "self.count = self.count + valid", "not close"),
    ("ppo_continuous", "learning_rate.fill_(", "learning_rate = torch.full_like(learning_rate, ", "not close"),
    ("a2c", "capturable=on_cuda", "capturable=False", "capturable=False while capturing"),
    ("a2c", "carry = torch.zeros(S, N, device=device)", "carry = torch.zeros(S, N)", "of the device and of the host"),
    ("sac", "torch._foreach_zero_(list(losses.values()))", NEW_LOSSES, "not close"),
    ("sac", STREAMS[0], "", "a stream has not waited for another"),
    ("sac", STREAMS[1], "", "a stream has not waited for another"),
    ("reinforce", WAIT + "  #", "pass  #", "has written to pinned memory"),
    ("reinforce", "    restore(state, saved)\n    torch", "    torch", "not close"),
]


@pytest.mark.parametrize(("script", "old", "new", "message"), FAULTS, ids=str, indirect=["script"])
def test_the_emulation_notices(script, old, new, message, quick):
    """So that the tests above say something."""
    more = {"baseline": "mean"} if script.__name__ == "reinforce" else {}
    with pytest.raises((RuntimeError, AssertionError), match=message):
        check_emulated_equals_cpu(script, quick | more, [(old, new)])
