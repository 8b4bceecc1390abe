"""--cudagraphs: the replayed iterations are the plain ones, and without a GPU a run goes on without."""

import pytest
import torch

from tests.conftest import same, short_run


def test_without_a_gpu_the_run_is_plain(vanilla_script, capsys):
    plain, _ = short_run(vanilla_script, total_timesteps=220)
    asked, _ = short_run(vanilla_script, total_timesteps=220, cudagraphs=True)
    assert same(plain, asked)
    assert capsys.readouterr().err == "--cudagraphs: going on without it: no GPU is used\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_iterations_are_the_plain_ones(gild_script):
    """Through the warm start and what follows: 150 iterations, the first 60 of them with GILD."""
    settings = dict(cuda=True, ws_frac=60 / 350)
    plain, evaluations = short_run(gild_script, **settings)
    replayed, _ = short_run(gild_script, **settings, cudagraphs=True)
    again, evaluations_again = short_run(gild_script, **settings, cudagraphs=True)
    for name, weight in plain.items():
        torch.testing.assert_close(replayed[name], weight, rtol=0, atol=1e-5)
    assert same(replayed, again) and evaluations.count("\n") == evaluations_again.count("\n")
