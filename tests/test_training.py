"""Whole runs: what repeats, what is left alone, what is logged, and that GILD's objective stays alive."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gild_td3
from tests.conftest import ALGORITHMS, ROOT, same, short_run


def test_a_seed_repeats_a_run_however_often_it_is_evaluated(gild_script):
    often = short_run(gild_script, ws_frac=0.15, eval_frequency=65)
    seldom = short_run(gild_script, ws_frac=0.15, eval_frequency=1_000)
    other = short_run(gild_script, ws_frac=0.15, eval_frequency=1_000, seed=2)
    assert same(often[0], seldom[0]) and not same(often[0], other[0])
    header, *rows = often[1].splitlines()
    assert len(rows) == 4 and seldom[1].splitlines() == [header, rows[-1]]


def test_without_warm_start_gild_is_the_vanilla_algorithm(gild_script, vanilla_script):
    gild, vanilla = short_run(gild_script, ws_frac=0.0), short_run(vanilla_script)
    assert same(gild[0], vanilla[0]) and gild[1] == vanilla[1]


# 0.1 * 260 = 26 of the 60 iterations, or all of them; TD3 updates the actor in every second one
UPDATES = {0.1: (26, 13, 26), 1.0: (60, 30, 60)}


@pytest.mark.parametrize("ws_frac", UPDATES)
def test_the_number_of_gild_updates(gild_script, algorithm, monkeypatch, ws_frac):
    original = gild_script.gild_gradients
    omegas, omega_steps, demonstration_reads = [], [], []

    def counted(actor, critic, gild, *args):
        omegas.append([p.detach().clone() for p in gild.parameters()])
        omega_steps.append(original(actor, critic, gild, *args))
        return omega_steps[-1]

    original_sample = gild_script.DemonstrationBuffer.sample
    monkeypatch.setattr(gild_script, "gild_gradients", counted)
    monkeypatch.setattr(
        gild_script.DemonstrationBuffer,
        "sample",
        lambda self, size: demonstration_reads.append(size) or original_sample(self, size),
    )
    short_run(gild_script, ws_frac=ws_frac, gild_lr=1e-3, gild_eps=1e-12)
    expected = UPDATES[ws_frac][ALGORITHMS.index(algorithm)]
    assert len(omegas) == expected
    assert len(demonstration_reads) == expected  # and none after the warm start
    # Adam's first step on omega moves its largest coordinate by the learning rate
    largest = max((a - b).abs().max() for a, b in zip(omegas[0], omegas[1], strict=True))
    assert abs(largest - 1e-3) < 1e-5


def test_only_a_run_with_gild_reads_demonstrations(gild_script):
    settings = dict(demo_path="none.npz", total_timesteps=50)
    short_run(gild_script, ws_frac=0.0, **settings)
    with pytest.raises(gild_script.InputError):
        short_run(gild_script, ws_frac=0.5, **settings)


def scalars(name):
    (run_dir,) = (path for path in (Path.cwd() / "runs").iterdir())
    return [event.value for event in EventAccumulator(str(run_dir)).Reload().Scalars(name)]


@pytest.mark.parametrize("policy_frequency", [2, 7])  # 7: the actor rests where the logs are written
def test_the_newest_actor_update_is_logged(policy_frequency):
    short_run(gild_td3, ws_frac=0.7, total_timesteps=500, policy_frequency=policy_frequency)
    assert len(scalars("losses/qf_loss")) == len(scalars("losses/actor_loss")) == 3
    assert all(np.isfinite(scalars("losses/actor_loss")))
    assert len(scalars("losses/meta_loss")) == 3  # 0.7 * 500 > 300 iterations


@pytest.mark.parametrize("settings", ["released", "default"])
def test_the_released_settings_collapse_and_the_defaults_do_not(settings, monkeypatch):
    """As released, omega shrinks while Q is silent, f becomes the constant ln 2 and its slope dies."""
    import gild_ddpg

    monkeypatch.setattr(gild_ddpg, "fit_imitation", partial(gild_ddpg.fit_imitation, iterations=400))
    released = dict(gild_init="random", gild_lr=1e-4, gild_eps=1e-8, gild_weight_decay=1e-4)
    changes = released if settings == "released" else dict(gild_init="imitation")
    changes["total_timesteps"] = 900 if settings == "released" else 500
    changes |= dict(ws_frac=1.0, learning_starts=100, batch_size=16)
    short_run(gild_ddpg, **changes, eval_frequency=1_000, eval_episodes=1)
    slope, objective = scalars("losses/gild_action_grad_norm"), scalars("losses/gild_loss")
    if settings == "released":
        assert slope[0] > 2e-3 and slope[-1] < 0.05 * slope[0]
        assert objective[-1] == pytest.approx(0.6931, abs=2e-3)
    else:
        assert min(slope) > 1e-2


@pytest.mark.parametrize("task", ["Point2D-v0", "HalfCheetah-v5"])
def test_the_fitted_objective_is_the_imitation_error(task):
    """Once for all algorithms: GILD and fit_imitation are the same in each script."""
    env = gild_td3.make_env(gild_td3.Args(env_id=task), training=True)
    path = ROOT / "demos" / f"{gild_td3.task_name(task)}-td3.npz"
    demonstrations = gild_td3.DemonstrationBuffer(path, task, env, torch.device("cpu"))
    torch.manual_seed(0)
    gild = gild_td3.GILD(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
    assert gild_td3.fit_imitation(gild, demonstrations, iterations=500) < 5e-3
    demo_obs, demo_action = demonstrations.sample(1_000)
    action = (torch.rand_like(demo_action) * 2 - 1).requires_grad_()
    error = (action - demo_action).pow(2).mean(1, keepdim=True)
    slope, expected = (
        torch.autograd.grad(f.sum(), action)[0] for f in (gild(demo_obs, demo_action, action), error)
    )
    assert torch.cosine_similarity(slope, expected).mean() > 0.95


def test_the_logs_of_a_run(gild_script):
    short_run(gild_script, ws_frac=1.0, total_timesteps=300, eval_frequency=140)
    losses = "actor_loss", "gild_loss", "meta_loss", "gild_action_grad_norm", "meta_grad_norm", "qf1_values"
    charts = "imitation_distance", "SPS", "episodic_return", "episodic_length"
    names = [f"losses/{name}" for name in losses] + [f"charts/{name}" for name in charts]
    for name in [*names, "eval/return_mean", "eval/return_std"]:
        assert np.isfinite(scalars(name)).all() and len(scalars(name)) > 0, name
    assert scalars("charts/episodic_length") == [100.0] * 3
    (run_dir,) = (Path.cwd() / "runs").iterdir()
    rows = (run_dir / "evaluations.csv").read_text().splitlines()
    assert rows[0] == "global_step,return_mean,return_std"
    assert [row.split(",")[0] for row in rows[1:]] == ["140", "280", "300"]
    metadata = json.loads((run_dir / "args.json").read_text())
    assert metadata["args"]["ws_frac"] == 1.0 and metadata["versions"]["torch"] == torch.__version__


def test_sac_runs_without_entropy():
    import gild_sac

    weights, _ = short_run(gild_sac, alpha=0.0, total_timesteps=210, ws_frac=0.0)
    assert all(value.isfinite().all() for value in weights.values())


def test_runs_started_in_the_same_second_get_separate_folders():
    settings = dict(env_id="Point2D-v0", total_timesteps=1, buffer_size=10, eval_episodes=1, cuda=False)
    args = gild_td3.Args(ws_frac=0.0, **settings)
    folders = {gild_td3.train(args).name for _ in range(3)}
    assert len(folders) == 3
    assert all(re.fullmatch(r"Point2D-v0__gild_td3__1__\d+\.\d{6}", name) for name in folders)


def test_policies_are_kept_when_asked(vanilla_script):
    settings = dict(env_id="Point2D-v0", total_timesteps=30, eval_frequency=10, eval_episodes=1, cuda=False)
    run_dir = vanilla_script.train(vanilla_script.Args(keep_policies=True, buffer_size=100, **settings))
    assert sorted(path.name for path in (run_dir / "policies").iterdir()) == ["10.pt", "20.pt", "30.pt"]
    last = torch.load(run_dir / "policies" / "30.pt", weights_only=True)
    newest = torch.load(run_dir / "policy.pt", weights_only=True)
    assert last["global_step"] == newest["global_step"] == 30 and same(last["actor"], newest["actor"])
    assert newest["args"]["env_id"] == "Point2D-v0" and newest["script"] == vanilla_script.__name__


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_alone_in_an_empty_folder(algorithm, tmp_path):
    script = shutil.copy(ROOT / f"gild_{algorithm}.py", tmp_path)
    shutil.copy(ROOT / "demos" / "Hopper-td3.npz", tmp_path / "d.npz")
    flags = "--env-id Hopper-v4 --demo-path d.npz --gild-init random --ws-frac 1 --total-timesteps 48"
    flags += " --learning-starts 32 --batch-size 32 --eval-frequency 40 --eval-episodes 1 --no-cuda"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, script, *flags.split()]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("runs/Hopper-v4__gild_") and "return" in lines[2]
    (run_dir,) = (tmp_path / "runs").iterdir()
    files = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
    assert files == {"args.json", "checkpoint.pt", "evaluations.csv", "policy.pt"}
