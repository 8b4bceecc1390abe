"""Kills runs at random moments, resumes them, and compares them with an uninterrupted run, bit for bit.

    python -m tests.soak --kills 100

Each algorithm in turn trains on Point2D, inside and after the warm start; a SIGKILL strikes at a random
moment, the writing of a checkpoint included (one is written at the end of every episode).
"""

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
ALGORITHMS = ("ddpg", "td3", "sac")
FLAGS = """--env-id Point2D-v0 --total-timesteps 1500 --learning-starts 200 --batch-size 32 --ws-frac 0.4
--gild-init random --eval-frequency 250 --eval-episodes 2 --checkpoint-frequency 1 --buffer-size 1200
--clone-steps 20 --critic-norm --no-cuda"""

# a server that has imported the scripts forks each run: no kill is wasted on a run's imports
methods = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
CONTEXT.set_forkserver_preload([*(f"gild_{algorithm}" for algorithm in ALGORITHMS), "torch._dynamo"])


def run(algorithm: str, folder: Path, flags: list[str]):
    """What the command line does, in this process."""
    os.chdir(folder)
    tqdm.set_lock(threading.RLock())  # a kill would leave the semaphore of tqdm's own lock behind
    sys.argv = [f"gild_{algorithm}.py", *flags]
    with open("output.txt", "a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        script = import_module(f"gild_{algorithm}")
        script.main(script.train, script.Args)


def start(algorithm: str, folder: Path, flags: list[str]) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=run, args=(algorithm, folder, flags))
    with chdir(ROOT):  # where the server, if this is its first process, finds the scripts
        process.start()
    return process


def finish(process: BaseProcess, folder: Path) -> Path:
    """Waits for a run to end. Returns its folder."""
    process.join(600)
    process.kill()  # if it still runs
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def uninterrupted(algorithm: str, folder: Path, flags=FLAGS) -> Path:
    return finish(start(algorithm, folder, flags.split()), folder)


def killed(algorithm: str, folder: Path, moments: list[float], flags=FLAGS) -> tuple[Path, int]:
    """A run that is killed after each of these times, in seconds since its start or its last resume.

    Returns its folder and the number of kills that came before its end.
    """
    struck = 0
    while True:
        runs = list(folder.glob("runs/*"))
        if runs and not (runs[0] / "checkpoint.pt").exists():
            shutil.rmtree(folder / "runs")  # killed before its first checkpoint: start again
            runs = []
        process = start(algorithm, folder, ["--resume", str(runs[0])] if runs else flags.split())
        if struck < len(moments):
            process.join(moments[struck])
        if struck == len(moments) or process.exitcode is not None:
            return finish(process, folder), struck
        process.kill()
        process.join()
        struck += 1


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
        assert one.keys() == other.keys() and one["global_step"] == other["global_step"]
        for key in one.keys() - {"args"}:
            assert equal(one[key], other[key]), (name, key)


@dataclass
class Args:
    kills: int = 100  # in all
    seed: int = 0  # of the moments


def main(args: Args):
    rng = random.Random(args.seed)
    struck = dict.fromkeys(ALGORITHMS, 0)
    runs, most = 0, min(12, -(-args.kills // 3))
    with tempfile.TemporaryDirectory() as folder:
        whole = {algorithm: uninterrupted(algorithm, Path(folder) / algorithm) for algorithm in struck}
        while sum(struck.values()) < args.kills:
            for algorithm in struck:
                runs += 1
                target = Path(folder) / f"{algorithm}-{runs}"
                moments = [rng.uniform(0, 2) for _ in range(min(most, args.kills - sum(struck.values())))]
                path, kills = killed(algorithm, target, moments)
                struck[algorithm] += kills
                assert_same_run(path, whole[algorithm])
                print(f"{algorithm}: {kills} kills, identical", flush=True)
    total = sum(struck.values())
    print(f"{total} kills in {runs} runs, {struck}: each run is the uninterrupted one, bit for bit")


if __name__ == "__main__":
    main(tyro.cli(Args))
