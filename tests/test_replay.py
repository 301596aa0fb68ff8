"""What CUDA graphs ask of the updates, checked without a GPU: the operations of one call, recorded and replayed on the
same addresses, train exactly as calling the function does, and none of them waits for a value on the host."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HOST_SYNCS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
SHORTEST = {"ddpg": 160, "sac": 160}  # steps; the others take ten iterations of 64


class NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket not in HOST_SYNCS, f"{op} waits for the device"
        assert not (op is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]))
        return op(*args, **(kwargs or {}))


def record(script, calls):
    """A stand-in for `capture`: like a CUDA graph it keeps the operations and their addresses, and no Python."""

    def capture(function, state, args, device):
        saved, generator = {name: tensor.clone() for name, tensor in state.items()}, torch.get_rng_state()
        function()  # CUDA's warm-up
        script.restore(state, saved)
        with NoHostSync():
            function()
        script.restore(state, saved)

        def recorded(x):
            function()
            return x

        graph = make_fx(recorded)(torch.zeros(1))
        script.restore(state, saved)
        torch.set_rng_state(generator)
        calls[function.__name__] = 0

        def replay():
            calls[function.__name__] += 1
            with torch.no_grad():
                graph(torch.zeros(1))

        return replay

    return capture


def test_replay_equals_calling(script, quick, monkeypatch):
    """Before and after resuming, so that no recorded address is stale."""
    total = SHORTEST.get(script.__name__, quick["total_timesteps"])
    args = quick | {"num_seeds": 2, "num_evaluations": 1, "total_timesteps": total}
    if script.__name__ == "a2c":
        args["optimizer"] = "adam"  # RMSprop takes a learning rate that can change in a graph on CUDA only
    if script.__name__ == "trpo":  # judges all candidates at once, as on CUDA
        search = script.line_search
        monkeypatch.setattr(script, "line_search", lambda *given: search(*given[:-1], given[-2].line_search_steps))
    states, calls = [], {}
    for capture in (script.capture, record(script, calls)):
        monkeypatch.setattr(script, "capture", capture)
        folders = script.train(script.Args(**args))
        script.train(script.Args(**args | {"total_timesteps": 2 * total, "resume": str(folders[0])}))
        states.append(torch.load(folders[0] / "checkpoint.pt", weights_only=True)["state"])
    assert len(calls) >= 2
    assert all(calls.values()), calls
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
