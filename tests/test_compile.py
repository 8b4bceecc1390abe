"""--compile and --bf16: the updates stay the same, up to rounding."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import gild_td3
from benchmark.cost import Learner
from tests.conftest import same, short_run

NETWORKS = "actor", "critic", "target_actor", "target_critic", "gild"


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
    """Each update was compiled, as a whole and once."""
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_a_run_with_compile(monkeypatch):
    """TD3's loop for a hundred iterations, the first half of them with GILD."""

    class Actor(gild_td3.Actor):
        def forward(self, obs):
            return super().forward(obs.double())  # environments and demonstrations stay in float32

    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(gild_td3, "Actor", Actor)
    settings = dict(total_timesteps=300, ws_frac=50 / 300, checkpoint_frequency=1)
    for compiled in (False, True):
        assert counters["stats"]["unique_graphs"] == 0
        short_run(gild_td3, **settings, compile=compiled)
    assert_three_graphs()
    eager, compiled = (torch.load(path) for path in sorted(Path("runs").glob("*/checkpoint.pt")))
    assert eager["global_step"] == compiled["global_step"] == 300
    for network in NETWORKS:
        assert_close(compiled[network], eager[network])


@pytest.mark.parametrize("algorithm", ["ddpg", "sac"])
def test_a_hundred_compiled_updates(algorithm):
    """The other scripts' graphs, run operator by operator: most of a minute of generating code is saved."""
    torch.set_default_dtype(torch.float64)
    learners = []
    for compile in (None, partial(torch.compile, backend="aot_eager_decomp_partition")):
        torch.manual_seed(0)
        learners.append(Learner(algorithm, compile, batch_size=32))
        start = deepcopy(learners[-1].parts)
        for number in range(100):
            torch.manual_seed(number)
            learners[-1].iterate(number, with_gild=number < 50)
    assert_three_graphs()
    for network in NETWORKS:
        eager, compiled, untrained = (parts[network].state_dict() for parts in (*(x.parts for x in learners), start))
        assert_close(compiled, eager)
        assert not same(eager, untrained)
