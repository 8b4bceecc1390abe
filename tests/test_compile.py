"""--compile and --bf16: the updates stay the same, up to rounding."""

from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters

import gild_td3
from benchmark.cost import Learner
from tests.conftest import ALGORITHMS, same, short_run


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Float64, and one hidden layer instead of two: less C++ to generate and compile."""
    for algorithm in ALGORITHMS:
        monkeypatch.setattr(import_module(f"gild_{algorithm}"), "mlp", small_mlp)
    torch.set_default_dtype(torch.float64)
    counters.clear()
    yield
    torch.compiler.reset()


def small_mlp(inputs, outputs, norm=False):
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def assert_close(actual: dict, expected: dict):
    """To 1e-8, in float64: in float32, Adam can turn the rounding of a gradient near 0 into a full step."""
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=1e-8)


def assert_three_graphs():
    """Each of the three updates was compiled once, as a whole."""
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_a_run_with_compile(fresh_compiler, monkeypatch):
    """TD3's loop for a hundred iterations, the first half of them with GILD."""

    class Actor(gild_td3.Actor):
        def forward(self, obs):
            return super().forward(obs.double())  # environments and demonstrations stay in float32

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
def test_a_hundred_compiled_updates(fresh_compiler, algorithm):
    """The other scripts' graphs, executed without generating C++, which would take two more minutes."""
    learners = []
    for compile in (None, partial(torch.compile, backend="aot_eager_decomp_partition")):
        torch.manual_seed(0)
        learners.append(Learner(algorithm, compile=compile, batch_size=32))
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


def test_bf16_rounds_the_losses_only(algorithm):
    """By about 2^-8; weights, gradients and optimizers stay in float32."""
    learners = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        learners.append(Learner(algorithm, bf16=bf16))
        learners[-1].iterate(0, with_gild=False)
    exact, rounded = learners
    changes = {
        name: (rounded.log[name].float() - value).abs().mean() / value.abs().mean()
        for name, value in exact.log.items()
    }
    assert min(changes.values()) > 0 and 1e-3 < max(changes.values()) < 1e-2
    for name in ("actor", "critic"):
        slopes = [
            torch.cat([parameter.grad.flatten() for parameter in learner.networks[name].parameters()])
            for learner in learners
        ]
        assert torch.cosine_similarity(*slopes, dim=0) > 0.99
    states = [moments for optimizer in rounded.optimizers.values() for moments in optimizer.state.values()]
    assert len(states) == sum(len(list(rounded.networks[name].parameters())) for name in ("actor", "critic"))
    states += [network.state_dict() for network in rounded.networks.values()]
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("module", ["gild_{}", "baselines.{}", "baselines.{}_il"])
def test_a_run_with_bf16(module, algorithm):
    """Ten Adam steps could move the weights 20 learning rates apart; rounding moves them less than one."""
    script = import_module(module.format(algorithm))
    settings = dict(total_timesteps=210, eval_episodes=1)
    exact, _ = short_run(script, **settings)
    rounded, _ = short_run(script, **settings, bf16=True)
    assert not same(exact, rounded)
    for name, weight in rounded.items():
        assert weight.dtype == torch.float32
        assert (weight - exact[name]).abs().mean() < script.Args.learning_rate
