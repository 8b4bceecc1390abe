"""Makes a demonstration file from scratch: trains an Expert, picks a Behavior policy, collects its episodes.

    python -m demos.make --env-id Walker2d-v4 --algo td3

The Expert is `python -m baselines.ALGO --dense`. Its Behavior policy is the first evaluation whose mean
return lies between 40 % and 60 % of the Expert's (--band), over 10 episodes and again over 20 others. The
Expert's return is that of EXPERTS, or with --expert, which trains to the end, the run's own best. Training
stops when the policy is found. After Ctrl-C or SIGTERM the same command resumes it. With a higher --band and
another --out, a later policy of the same training is taken.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from demos.collect import collect
from evaluate import InputError, command_line, load_policy, rollout

FOLDER = Path(__file__).parent

# Published dense returns: best evaluation within 1e6 steps, mean over 10 seeds. DDPG ("OurDDPG") and TD3:
# Table 1 of Fujimoto, van Hoof and Meger, 2018. SAC: Tianshou's MuJoCo benchmark (Weng et al., 2022), as that
# table's SAC is an early one (655 on Ant). Point2D: the most that an episode can return.
EXPERTS = {
    "Hopper": {"ddpg": 1860.0, "td3": 3564.1, "sac": 3542.2},
    "Walker2d": {"ddpg": 3098.1, "td3": 4682.8, "sac": 5007.0},
    "HalfCheetah": {"ddpg": 8577.3, "td3": 9637.0, "sac": 12138.8},
    "Ant": {"ddpg": 888.8, "td3": 4372.4, "sac": 5850.2},
    "Point2D": {"ddpg": 83.8, "td3": 83.8, "sac": 83.8},
}
# Point2D has one start: a policy without noise has one return, mostly either near 0 or above 60
BANDS = dict.fromkeys(EXPERTS, (0.4, 0.6)) | {"Point2D": (0.5, 0.9)}
PAIRS = dict.fromkeys(EXPERTS, 4_000) | {"HalfCheetah": 10_000}


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium id of a task in EXPERTS
    algo: Literal["ddpg", "td3", "sac"] = "td3"  # the vanilla algorithm
    expert: bool = False  # train to the end first, and take the run's own best evaluation for the Expert's
    band: tuple[float, float] | None = None  # Behavior / Expert, from and to; None: 0.4 0.6, Point2D 0.5 0.9
    seed: int = 1  # seed of the training
    total_timesteps: int = 1_000_000  # environment steps of the training, at most
    compile: bool = False  # compile the training's updates: faster, with different rounding
    out: Path = FOLDER  # folder for <task>-<algo>.npz and policies/<task>-<algo>.pt


def start(command: list[str]) -> subprocess.Popen:
    """A training, in a process that `stop` can signal."""
    return subprocess.Popen(
        [sys.executable, "-u", *command],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows'
    )


def stop(process: subprocess.Popen):
    """Lets a training end its episode and leave a checkpoint. Windows' terminate() would leave none."""
    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
    process.communicate()


def training(args: Args):
    """Starts or resumes the training, and stops it when closed.

    Yields the run's folder, and whether it has trained to the end, at the start and after every evaluation.
    """
    name = f"{args.algo}-expert"
    started = Path("runs").glob(f"{args.env_id}__{name}__{args.seed}__*/checkpoint.pt")
    run_dir = max((path.parent for path in started), default=None)
    command = ["-m", f"baselines.{args.algo}", "--total-timesteps", f"{args.total_timesteps}"]
    if run_dir:
        yield run_dir, max(evaluations(run_dir), default=0) >= args.total_timesteps
        command += ["--resume", f"{run_dir}"]
    else:
        command += ["--dense", "--keep-policies", "--no-cuda", "--env-id", args.env_id]
        command += ["--exp-name", name, "--seed", f"{args.seed}"]
        command += ["--compile"] * args.compile
        if args.env_id.startswith("Point2D"):  # learned within 3,000 steps
            command += ["--learning-starts", "1000", "--eval-frequency", "250"]
    with start(command) as process:
        try:
            for line in process.stdout:  # the run's folder, then a line per evaluation
                print(line, end="", flush=True)
                run_dir = run_dir or Path(line.split(" on ")[0])
                yield run_dir, False
            if process.wait():
                raise InputError(f"the training ended with code {process.returncode}")
            yield run_dir, True
        finally:
            stop(process)


def evaluations(run_dir: Path) -> dict[int, float]:
    """The mean return of each evaluation, by training step."""
    csv = run_dir / "evaluations.csv"
    rows = [row.split(",") for row in csv.read_text().splitlines()[1:]] if csv.exists() else []
    return {int(step): float(mean) for step, mean, _ in rows}


def behavior(run_dir: Path, low: float, high: float, explore: bool, known: dict[int, float]) -> int | None:
    """The training step of the Behavior policy, if there is one yet; `known` keeps the second evaluations."""
    for step, mean in evaluations(run_dir).items():
        if low <= mean <= high:
            if step not in known:
                actor, script, run, _ = load_policy(run_dir / f"policies/{step}.pt")
                with contextlib.closing(script.make_env(run, training=False)) as env:
                    episodes = islice(rollout(actor, script, run, env, 1_000, explore), 20)
                    known[step] = np.mean([episode["rewards"].sum() for episode in episodes])
                print(f"step {step:,}: {mean:.1f}, over 20 more episodes {known[step]:.1f}", flush=True)
            if low <= known[step] <= high:
                return step
    return None


def table(folder: Path) -> str:
    """The table of demos/README.md, from the files' own metadata."""
    lines = ["| file | training step | pairs | episodes | dense return | sparse return | of the Expert |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for task, experts in EXPERTS.items():
        for algo, expert in experts.items():
            path = folder / f"{task}-{algo}.npz"
            if path.exists():
                with np.load(path, allow_pickle=False) as file:
                    about, pairs = json.loads(str(file["metadata"])), len(file["observations"])
                cells = [path.stem, f"{about['global_step']:,}", f"{pairs:,}", str(about["episodes"])]
                for name in ("return", "sparse_return"):
                    cells.append(f"{about[f'{name}_mean']:.1f} ± {about[f'{name}_std']:.1f}")
                cells.append(f"{about['return_mean'] / expert:.0%}")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def update_readme(folder: Path):
    readme = folder / "README.md"
    if readme.exists():
        text = readme.read_text("utf-8")
        text = re.sub(r"(?m)^\| file \|.*\n(\|.*\n)*", lambda _: table(folder), text)
        readme.write_text(text, "utf-8")


def main(args: Args):
    task = args.env_id.split("-v")[0]
    if task not in EXPERTS:
        raise InputError(f"--env-id {args.env_id} has no Expert's return; there are {', '.join(EXPERTS)}")
    band = args.band or BANDS[task]
    if not 0 <= band[0] < band[1]:
        raise InputError(f"--band {band[0]} {band[1]}: the lower share comes first, and none is negative")
    policy, out = args.out / f"policies/{task}-{args.algo}.pt", args.out / f"{task}-{args.algo}.npz"
    try:
        policy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {error}") from None
    expert, explore, known = EXPERTS[task][args.algo], task == "Point2D", {}
    with contextlib.closing(training(args)) as states:
        for run_dir, ended in states:
            if args.expert:
                expert = max(evaluations(run_dir).values()) if ended else math.inf
            low, high = (share * expert for share in band)
            step = behavior(run_dir, low, high, explore, known)
            if step or ended:
                break
    if step is None:
        raise InputError(f"{run_dir} has no policy with a return from {low:.0f} to {high:.0f}")
    shutil.copy(run_dir / f"policies/{step}.pt", policy)
    about = collect(policy, out, PAIRS[task], explore, seed=0)
    print(f"{out}: {about['pairs']} pairs, return {about['return_mean']:.1f} ± {about['return_std']:.1f}")
    update_readme(args.out)


if __name__ == "__main__":
    command_line(main, Args)
