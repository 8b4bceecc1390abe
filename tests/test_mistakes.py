"""What users get wrong, on the real command line: one line on standard error, code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, write_demonstrations

SHORT = "--env-id Point2D-v0 --total-timesteps 300 --learning-starts 256 --eval-episodes 1 --no-cuda"

# flags, and words that the line must have
ARGUMENTS = {
    "--ws-frac 1.5": "ws-frac",
    "--ws-frac -0.1": "ws-frac",
    "--ws-frac much": "ws-frac",
    "--gamma 1.1": "gamma",
    "--gamma nan": "gamma",
    "--tau -1": "tau",
    "--learning-rate -0.001": "learning-rate",
    "--learning-rate inf": "learning-rate",
    "--total-timesteps 0": "total-timesteps",
    "--total-timesteps 1e6": "total-timesteps",
    "--buffer-size 0": "buffer-size",
    "--buffer-size 100000000000": "buffer-size",
    "--batch-size 0": "batch-size",
    "--batch-size 257": "learning-starts",
    "--learning-starts -1": "learning-starts",
    "--policy-frequency 0": "policy-frequency",
    "--exploration-noise -1": "exploration-noise",
    "--eval-frequency 0": "eval-frequency",
    "--eval-episodes 0": "eval-episodes",
    "--checkpoint-frequency 0": "checkpoint-frequency",
    "--torch-threads 0": "torch-threads",
    "--seed -1": "seed",
    "--seed one": "seed",
    "--gild-init imitate": "gild-init",
    "--meta-loss gains": "meta-loss",
    "--gild-eps -1": "gild-eps",
    "--ws-fraction 0.1": "ws-frac",
    "0.1": "Unrecognized",
    "--env-id Hoper-v4": "Hopper",
    "--env-id Hopper-v9": "Hopper",
    "--env-id no_such_module:Env-v0": "no_such_module",
    "--env-id CartPole-v1": "Box",
    "--env-id Blackjack-v1": "Box",
    "--env-id Pendulum-v1 --sparse-threshold 1 --ws-frac 0": "x_position",
    "--resume runs/none": "runs/none",
    "--demo-path none.npz": "none.npz",
    "--demo-path text.npz": "text.npz",
    "--demo-path truncated.npz": "truncated.npz",
    "--demo-path pickled.npz": "pickled.npz",
    "--demo-path hopper.npz": "Hopper",
    "--demo-path nan.npz": "nan.npz",
    "--env-id Walker2d-v4 --demo-path hopper.npz": "Walker2d",
    "--resume text.npz": "text.npz",
    "--resume empty": "empty",
    "--resume other": "another",
    "--resume truncated": "truncated",
    "--resume foreign": "foreign/checkpoint.pt is no checkpoint to go on from: it is of a run with other",
    "--resume older": "older/checkpoint.pt is no checkpoint to go on from: 'generators'",
    "--resume whole --seed 5": "seed 1 -> 5",
    "--resume whole --gild-lr 0.1": "gild_lr",
    "--resume whole --total-timesteps 299": "total_timesteps 300 -> 299",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with bad files, and with a run to resume and damaged copies of it."""
    folder = tmp_path_factory.mktemp("mistakes")
    command = [sys.executable, ROOT / "gild_td3.py", *SHORT.split(), "--gild-init", "random"]
    subprocess.run([*command, "--checkpoint-frequency", "1"], cwd=folder, check=True, capture_output=True)
    (run_dir,) = (folder / "runs").iterdir()
    run_dir.rename(folder / "whole")
    shutil.rmtree(folder / "runs")
    (folder / "empty").mkdir()
    for name in ("other", "truncated", "foreign", "older"):
        shutil.copytree(folder / "whole", folder / name)
    about = json.loads((folder / "other" / "args.json").read_text())
    about["args"]["another"] = 1  # an argument that this version has not
    (folder / "other" / "args.json").write_text(json.dumps(about))
    checkpoint = folder / "truncated" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    state = torch.load(folder / "whole" / "checkpoint.pt", weights_only=True)
    torch.save({**state, "args.json": "of another run"}, folder / "foreign" / "checkpoint.pt")
    del state["generators"]
    torch.save(state, folder / "older" / "checkpoint.pt")

    good = write_demonstrations(folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(good[: len(good) // 2])
    (folder / "text.npz").write_text("observations")
    np.savez(
        folder / "pickled.npz", observations=np.array([{}]), actions=np.array([{}]), metadata=np.array("{}")
    )
    write_demonstrations(folder / "hopper.npz", "Hopper-v4", 11, 3)
    bad = np.full((8, 2), np.nan)
    np.savez(folder / "nan.npz", observations=bad, actions=bad, metadata=np.array('{"env_id": "Point2D-v0"}'))
    return folder


def attempt(folder, flags):
    # the last flag of a name counts; a resumed run brings its own
    command = [
        sys.executable,
        ROOT / "gild_td3.py",
        *([] if "--resume" in flags else SHORT.split()),
        *flags.split(),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_mistake_gets_one_line(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(
            zip(ARGUMENTS, pool.map(lambda flags: attempt(folder, flags), ARGUMENTS), strict=True)
        )
    for flags, outcome in outcomes.items():
        assert outcome.returncode == 2, (flags, outcome)
        assert len(outcome.stderr.splitlines()) == 1 and "Traceback" not in outcome.stderr, (flags, outcome)
        assert ARGUMENTS[flags] in outcome.stderr, (flags, outcome)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(ARGUMENTS) >= 40


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file where the runs' folder should be")
    outcome = attempt(tmp_path, "--ws-frac 0")
    assert outcome.returncode == 2 and len(outcome.stderr.splitlines()) == 1
