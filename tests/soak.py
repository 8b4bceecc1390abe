"""Kills runs again and again, resumes them, and compares them with an uninterrupted run, bit for bit.

    python -m tests.soak --kills 100

Each algorithm in turn trains on Point2D, inside and after the warm start; a SIGKILL strikes at a random
moment, the writing of a checkpoint included (one is written at every episode's end).
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parents[1]
FLAGS = """--env-id Point2D-v0 --total-timesteps 1500 --learning-starts 200 --batch-size 32 --ws-frac 0.4
--gild-init random --eval-frequency 250 --eval-episodes 2 --checkpoint-frequency 1 --buffer-size 1200
--no-cuda"""


def start(algorithm: str, folder: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, ROOT / f"gild_{algorithm}.py", *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def run_dir(folder: Path) -> Path:
    (only,) = (folder / "runs").iterdir()
    return only


def uninterrupted(algorithm: str, folder: Path) -> Path:
    folder.mkdir()
    finish(start(algorithm, folder, FLAGS.split()))
    return run_dir(folder)


def killed(algorithm: str, folder: Path, kills: int, rng: random.Random) -> tuple[Path, int]:
    """A run that is killed up to `kills` times. Returns its folder and how many kills came before its end."""
    folder.mkdir()
    struck = 0
    while True:
        runs = list((folder / "runs").glob("*")) if (folder / "runs").exists() else []
        if runs and not (runs[0] / "checkpoint.pt").exists():
            shutil.rmtree(folder / "runs")  # killed before its first checkpoint: begin anew
            runs = []
        process = start(algorithm, folder, ["--resume", str(runs[0])] if runs else FLAGS.split())
        if struck == kills:
            finish(process)
            return run_dir(folder), struck
        # wait for the run's own time to begin, not for the interpreter's, then strike within the run
        begun = time.time()
        while process.poll() is None and time.time() - begun < 60 and not writes_since(folder, begun):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            finish(process)
            return run_dir(folder), struck
        process.kill()
        process.communicate()
        struck += 1


def writes_since(folder: Path, moment: float) -> bool:
    files = folder.glob("runs/*/checkpoint.*")
    try:
        return any(os.stat(file).st_mtime > moment for file in files)
    except FileNotFoundError:  # renamed meanwhile
        return True


def equal(a, b) -> bool:
    """Bit-equality of nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a: Path, b: Path):
    """Evaluations, the actor, and in the checkpoint networks, optimizers, generators and replay buffer."""
    assert (a / "evaluations.csv").read_bytes() == (b / "evaluations.csv").read_bytes()
    for name in ("policy.pt", "checkpoint.pt"):
        one, other = (torch.load(path / name, weights_only=True) for path in (a, b))
        assert one["global_step"] == other["global_step"]
        for key in set(one) - {"args.json"}:
            assert equal(one[key], other[key]), (name, key)


@dataclass
class Args:
    kills: int = 100  # in all
    seed: int = 0  # of the moments


def main(args: Args):
    rng = random.Random(args.seed)
    struck = {"ddpg": 0, "td3": 0, "sac": 0}
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = {algorithm: uninterrupted(algorithm, Path(folder) / algorithm) for algorithm in struck}
        while sum(struck.values()) < args.kills:
            for algorithm in struck:
                runs += 1
                target = Path(folder) / f"{algorithm}-{runs}"
                path, kills = killed(algorithm, target, min(12, args.kills - sum(struck.values())), rng)
                struck[algorithm] += kills
                assert_same_run(path, whole[algorithm])
                print(f"{algorithm}: {kills} kills, identical", flush=True)
    total = sum(struck.values())
    print(f"{total} kills in {runs} runs, {struck}; each run is to the bit the uninterrupted one")


if __name__ == "__main__":
    main(tyro.cli(Args))
