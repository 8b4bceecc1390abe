"""Runs the comparisons of the README, a process a run, and keeps their results as small CSV files.

    python -m benchmark.study point2d --jobs 2

A run's result is benchmark/results/STUDY/VARIANT-SEED.csv, one row an evaluation. Runs that have a result are
skipped, so that a study can be stopped and started again.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from demos.collect import load_policy, rollout
from demos.make import EXPERTS

RESULTS = Path(__file__).parent / "results"

OPTIMIZER_A = "--gild-lr 1e-5 --gild-eps 1e-8"
OPTIMIZER_B = "--gild-lr 1e-4 --gild-eps 1e-3"
RELEASED = "--gild-init random --gild-lr 1e-4 --gild-eps 1e-8 --gild-weight-decay 1e-4"
POINT2D = "--env-id Point2D-v0 --total-timesteps 60000 --eval-frequency 1000"
HOPPER = "--env-id Hopper-v4 --total-timesteps 100000"
WARM_START = "--total-timesteps 30000 --ws-frac 0.33333"  # 10,000 iterations, as 1 % of a million steps
TASKS = {task: f"{task}-v{0 if task == 'Point2D' else 4}" for task in EXPERTS}

# study: (shared flags, {variant: (command, seeds)})
STUDIES = {
    "point2d": (
        POINT2D,
        {
            "td3": ("-m baselines.td3", 3),
            "td3-il": ("-m baselines.td3_il", 3),
            "td3-gild-A": (f"gild_td3.py --ws-frac 1 {OPTIMIZER_A}", 3),
            "td3-gild-B": (f"gild_td3.py --ws-frac 1 {OPTIMIZER_B}", 3),
            "td3-gild-released": (f"gild_td3.py --ws-frac 1 {RELEASED}", 3),
            "ddpg-gild-B": (f"gild_ddpg.py --ws-frac 1 {OPTIMIZER_B}", 1),
            "sac-gild-B": (f"gild_sac.py --ws-frac 1 {OPTIMIZER_B}", 1),
        },
    ),
    "hopper": (
        HOPPER,
        {
            "td3": ("-m baselines.td3", 2),
            "td3-il": ("-m baselines.td3_il", 2),
            "td3-bc": ("-m baselines.td3_il --il-beta 0", 2),
            "td3-gild-10k-A": (f"gild_td3.py --ws-frac 0.1 {OPTIMIZER_A}", 2),
            "td3-gild-10k-B": (f"gild_td3.py --ws-frac 0.1 {OPTIMIZER_B}", 2),
            "td3-gild-A": (f"gild_td3.py --ws-frac 1 {OPTIMIZER_A}", 2),
            "td3-gild-B": (f"gild_td3.py --ws-frac 1 {OPTIMIZER_B}", 2),
            "td3-gild-frozen": ("gild_td3.py --ws-frac 1 --gild-lr 0", 2),
        },
    ),
    "demonstrations": (
        WARM_START,
        {
            f"{algo}-{task}": (f"gild_{algo}.py --env-id {env_id}", 1)
            for task, env_id in TASKS.items()
            for algo in ("ddpg", "td3", "sac")
        },
    ),
}


def command(study: str, variant: str, seed: int) -> list[str]:
    shared, variants = STUDIES[study]
    return f"{variants[variant][0]} {shared} --seed {seed} --keep-policies --no-cuda".split()


def look_back(policy: Path, demonstrations) -> tuple[float, float]:
    """A saved policy's mean sparse return, and its mean squared distance to the demonstrated actions.

    The ten episodes begin like those of its evaluation in training.
    """
    actor, module, about = load_policy(policy)
    _, returns = rollout(actor, module, about["env_id"], 1, False, seed=about["seed"] + 100, episodes=10)
    actions = module.act(actor, demonstrations["observations"])
    return returns[:, 1].mean(), np.square(actions - demonstrations["actions"]).mean()


def write_result(run_dir: Path, algorithm: str, target: Path):
    """A run's evaluations, each with what the logs and `look_back` tell of the run and its policy by then."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    q = {event.step: event.value for event in events.Scalars("losses/qf1_values")}
    rewarded = [event.step for event in events.Scalars("charts/episodic_return") if event.value]
    warm_start = "charts/imitation_distance" in events.Tags()["scalars"]
    distances = events.Scalars("charts/imitation_distance") if warm_start else []
    rows = list(csv.DictReader((run_dir / "evaluations.csv").read_text().splitlines()))
    task = run_dir.name.split("-v")[0]
    with np.load(Path(__file__).parents[1] / "demos" / f"{task}-{algorithm}.npz", allow_pickle=False) as file:
        demonstrations = dict(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.writer(file)
        head = "global_step,return_mean,return_std,q_mean,sparse_return,imitation_distance"
        writer.writerow(f"{head},lowest_of_batches,rewarded_episodes".split(","))
        for row in rows:
            step = int(row["global_step"])
            numbers = float(row["return_mean"]), float(row["return_std"]), q.get(step, float("nan"))
            numbers += look_back(run_dir / "policies" / f"{step}.pt", demonstrations)
            past = [event.value for event in distances if event.step <= step]
            numbers += min(past, default=float("nan")), sum(end <= step for end in rewarded)
            writer.writerow([step, *(f"{number:.6g}" for number in numbers)])
    target.with_suffix(".tmp").replace(target)


def run(study: str, variant: str, seed: int):
    target = RESULTS / study / f"{variant}-{seed}.csv"
    if target.exists():
        return
    torch.set_num_threads(1)
    process = subprocess.run([sys.executable, *command(study, variant, seed)], capture_output=True, text=True)
    if process.returncode:
        print(f"{target.stem} failed: {process.stderr.strip().splitlines()[-1]}", flush=True)
        return
    write_result(Path(process.stdout.split(" on ")[0]), variant.split("-")[0], target)
    print(f"{target}", flush=True)


@dataclass
class Args:
    study: tyro.conf.Positional[str]  # point2d, hopper or demonstrations
    variants: tuple[str, ...] = ()  # only these [default: all]
    jobs: int = 1  # runs at a time, each of one thread


def main(args: Args):
    variants = STUDIES[args.study][1]
    chosen = args.variants or variants
    most = max(variants[variant][1] for variant in chosen)
    # seed by seed, so that an unfinished study compares every variant on the seeds it has
    runs = [(args.study, v, s) for s in range(1, most + 1) for v in chosen if s <= variants[v][1]]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: run(*one), runs))


if __name__ == "__main__":
    main(tyro.cli(Args))
