"""--compile and --bf16: the updates stay the same, up to rounding."""

from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import gild_td3
from benchmark.cost import Learner
from tests.conftest import ALGORITHMS, same, short_run


@pytest.fixture(autouse=True)
def fresh_compiler():
    counters.clear()
    yield
    torch.compiler.reset()


def assert_close(actual: dict, expected: dict):
    """To 1e-8, in float64: in float32, Adam can turn the rounding of a gradient near 0 into a full step."""
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-8)


def assert_three_graphs():
    """Each of the three updates was compiled once, as a whole."""
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_a_run_with_compile(monkeypatch):
    """TD3's loop for a hundred iterations, the first half of them with GILD."""

    class Actor(gild_td3.Actor):
        def forward(self, obs):
            return super().forward(obs.double())  # environments and demonstrations stay in float32

    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(gild_td3, "Actor", Actor)
    settings = dict(total_timesteps=300, ws_frac=50 / 300, checkpoint_frequency=1)
    short_run(gild_td3, **settings)
    assert not counters["stats"]
    short_run(gild_td3, **settings, compile=True)
    assert_three_graphs()
    eager, compiled = (torch.load(path) for path in sorted(Path("runs").glob("*/checkpoint.pt")))
    assert eager["global_step"] == compiled["global_step"] == 300
    for network in ("actor", "critic", "target_actor", "target_critic", "gild"):
        assert_close(compiled[network], eager[network])


@pytest.mark.parametrize("algorithm", ["ddpg", "sac"])
def test_a_hundred_compiled_updates(algorithm):
    """The other scripts' graphs, without the two minutes that generating code for them would take."""
    torch.set_default_dtype(torch.float64)
    learners = []
    for compile in (None, partial(torch.compile, backend="aot_eager_decomp_partition")):
        torch.manual_seed(0)
        learners.append(Learner(algorithm, compile, batch_size=32))
        start = deepcopy(learners[-1].networks)
        for number in range(100):
            torch.manual_seed(number)
            learners[-1].iterate(number, with_gild=number < 50)
    assert_three_graphs()
    eager, compiled = learners
    assert_close(compiled.log, eager.log)
    for name, network in eager.networks.items():
        assert_close(compiled.networks[name].state_dict(), network.state_dict())
        assert not same(network.state_dict(), start[name].state_dict())


def test_bf16_rounds_the_losses_and_keeps_the_weights_in_float32(algorithm):
    exact, rounded = (Learner(algorithm, bf16=bf16) for bf16 in (False, True))
    for learner in (exact, rounded):
        for name, network in learner.networks.items():
            network.load_state_dict(exact.networks[name].state_dict())
        torch.manual_seed(0)
        learner.iterate(0, with_gild=False)
    for name, value in exact.log.items():
        print(
            name, value.abs().mean(), ((rounded.log[name] - value).abs().mean() / value.abs().mean()).item()
        )
    assert 0


@pytest.mark.parametrize("module", ["gild_{}", "baselines.{}", "baselines.{}_il"])
def test_a_run_with_bf16(module, algorithm):
    script = import_module(module.format(algorithm))
    exact, _ = short_run(script)
    rounded, _ = short_run(script, bf16=True)
    for name, weight in rounded.items():
        print(name, (weight - exact[name]).abs().max(), (weight - exact[name]).abs().mean())
    assert 0
