"""Runs the comparisons of the README, one process per run, and keeps their results as small CSV files.

    python -m benchmark.study headline --jobs 2

A run's result is benchmark/results/STUDY/VARIANT-TASK-SEED.csv, or VARIANT-SEED.csv in a study of one task,
with a row per evaluation. Its output is in runs/STUDY-VARIANT-TASK-SEED.log. Ctrl-C and SIGTERM are passed on
to the runs, which finish their episode and write a checkpoint. The same command resumes them later and skips
the runs that have a result.
"""

import csv
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from baselines.common import DemonstrationBuffer, evaluate, make_env, task_name
from evaluate import load_policy

RESULTS = Path(__file__).parent / "results"
DEMOS = Path(__file__).parents[1] / "demos"

OPTIMIZER_A = "--gild-lr 1e-5 --gild-eps 1e-8"
OPTIMIZER_B = "--gild-lr 1e-4 --gild-eps 1e-3"
RELEASED = "--gild-init random --gild-lr 1e-4 --gild-eps 1e-8 --gild-weight-decay 1e-4"


@dataclass
class Study:
    tasks: list[str]  # env ids
    total_timesteps: int  # environment steps of a run
    flags: str  # further flags, shared by all runs
    variants: dict[str, tuple[str, int]]  # a variant's command, and its number of seeds


STUDIES = {
    "headline": Study(
        ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"],
        300_000,
        "--compile --bf16",
        {
            "td3": ("-m baselines.td3", 3),
            "td3-il": ("-m baselines.td3_il", 3),
            "td3-bc": ("-m baselines.td3_il --il-beta 0", 3),
            "td3-gild": ("gild_td3.py --ws-frac 0.033333", 3),  # 10,000 iterations, as 1 % of a million
            "td3-gild-frozen": ("gild_td3.py --ws-frac 0.033333 --gild-lr 0", 3),
            "td3-gild-end": ("gild_td3.py --ws-frac 1", 3),
        },
    ),
    "point2d": Study(
        ["Point2D-v0"],
        60_000,
        "--eval-frequency 1000",
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
    "hopper": Study(
        ["Hopper-v4"],
        100_000,
        "",
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
    "demonstrations": Study(
        ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Ant-v4", "Point2D-v0"],
        30_000,
        "--ws-frac 0.33333",
        {algorithm: (f"gild_{algorithm}.py", 1) for algorithm in ("ddpg", "td3", "sac")},
    ),
}


@dataclass
class Args:
    study: tyro.conf.Positional[str]  # headline, point2d, hopper or demonstrations
    variants: tuple[str, ...] = ()  # only these variants; empty: all
    tasks: tuple[str, ...] = ()  # only these tasks, such as Hopper-v4; empty: all
    jobs: int = 1  # runs at a time, each of one thread


def result(study: str, variant: str, env_id: str, seed: int) -> Path:
    task = f"{task_name(env_id)}-" if len(STUDIES[study].tasks) > 1 else ""
    return RESULTS / study / f"{variant}-{task}{seed}.csv"


def last_evaluation(run_dir: Path) -> int:
    path = run_dir / "evaluations.csv"
    return int(path.read_text().splitlines()[-1].split(",")[0]) if path.exists() else 0


def find_run(study: str, variant: str, env_id: str, seed: int) -> Path | None:
    """The folder of the run, finished or not; of several the one that got furthest."""
    run_dirs = []
    for path in Path("runs").glob(f"{env_id}__{variant}__{seed}__*/checkpoint.pt"):
        args = json.loads((path.parent / "args.json").read_text())["args"]
        if args["total_timesteps"] == STUDIES[study].total_timesteps and args["keep_policies"]:
            run_dirs.append(path.parent)
    return max(run_dirs, key=last_evaluation, default=None)


def write_result(run_dir: Path, algorithm: str, target: Path):
    """Writes a run's evaluations, with what its logs say up to each of them and what its kept policy shows:

    its mean sparse return from the same starts, and its mean squared distance to the demonstrated actions.
    """
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    q = {event.step: event.value for event in events.Scalars("losses/qf1_values")}
    rewarded = [event.step for event in events.Scalars("charts/episodic_return") if event.value]
    warm_start = "charts/imitation_distance" in events.Tags()["scalars"]
    distances = events.Scalars("charts/imitation_distance") if warm_start else []
    actor, script, args, _ = load_policy(run_dir / "policy.pt")
    env = make_env(args, training=True)  # with the sparse reward
    path = DEMOS / f"{task_name(args.env_id)}-{algorithm}.npz"
    demonstrations = DemonstrationBuffer(path, args.env_id, env, torch.device("cpu"))
    head = "global_step,return_mean,return_std,q_mean,sparse_return,imitation_distance"
    rows = [f"{head},lowest_of_batches,rewarded_episodes".split(",")]
    for row in csv.DictReader((run_dir / "evaluations.csv").read_text().splitlines()):
        if received_signals:
            return
        step = int(row["global_step"])
        policy = torch.load(run_dir / "policies" / f"{step}.pt", weights_only=True)
        actor.load_state_dict(policy["actor"])
        actions = script.act(actor, demonstrations.obs.numpy())
        past = [event.value for event in distances if event.step <= step]
        numbers = [float(row["return_mean"]), float(row["return_std"]), q.get(step, float("nan"))]
        numbers += [evaluate(script.act, actor, env, args.eval_episodes, seed=args.seed + 100).mean()]
        numbers += [np.square(actions - demonstrations.actions.numpy()).mean()]
        numbers += [min(past, default=float("nan")), sum(end <= step for end in rewarded)]
        rows.append([step, *(f"{number:.6g}" for number in numbers)])
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".tmp"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    target.with_suffix(".tmp").replace(target)
    print(target, flush=True)


received_signals, processes, lock = [], [], threading.RLock()


def forward(number, frame):
    """Signal handler: passes the signal on to the runs. A second one ends them at once."""
    received_signals.append(number)
    with lock:
        for process in processes:
            process.send_signal(number)


def run(name: str, variant: str, env_id: str, seed: int):
    """Trains, or resumes, one run and writes its result."""
    study, target = STUDIES[name], result(name, variant, env_id, seed)
    if target.exists() or received_signals:
        return
    run_dir = find_run(name, variant, env_id, seed)
    if run_dir is None or last_evaluation(run_dir) < study.total_timesteps:
        command = f"{study.variants[variant][0]} {study.flags} --exp-name {variant} --env-id {env_id}"
        command += f" --seed {seed} --total-timesteps {study.total_timesteps} --keep-policies --no-cuda"
        command = [sys.executable, "-u", *command.split()]
        command += ["--resume", str(run_dir)] if run_dir else []
        log = Path("runs", f"{name}-{target.stem}.log")
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file, lock:
            if received_signals:
                return
            # in a session of its own, so that Ctrl-C reaches it once, through `forward`
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            processes.append(process)
        if code := process.wait():
            print(f"{target.stem} ended with code {code}; its output is in {log}", flush=True)
            return
        run_dir = find_run(name, variant, env_id, seed)
    write_result(run_dir, variant.split("-")[0], target)


def main(args: Args):
    study = STUDIES[args.study]
    variants, tasks = args.variants or tuple(study.variants), args.tasks or tuple(study.tasks)
    for name in (*variants, *tasks):
        if name not in (*study.variants, *study.tasks):
            sys.exit(f"{args.study} has no {name}, only {', '.join([*study.variants, *study.tasks])}")
    seeds = {variant: study.variants[variant][1] for variant in variants}
    # seed by seed, so that an unfinished study compares all variants on the seeds it has
    order = product(range(1, 1 + max(seeds.values())), tasks, variants)
    runs = [(args.study, variant, task, seed) for seed, task, variant in order if seed <= seeds[variant]]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: run(*one), runs))
    if received_signals:
        sys.exit(128 + received_signals[0])


if __name__ == "__main__":
    main(tyro.cli(Args))
