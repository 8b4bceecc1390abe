"""How fast the scripts are, where their time goes, and how other libraries compare.

    python -m benchmark.speed

The learners' table: milliseconds per iteration (TD3's actor is updated in every second one), eager and
compiled, and the rate of its matrix products as a share of what products of 256 x 256 matrices reach alone.
The runs' table: environment steps per second of a run that learns, everything included, on sparse Hopper-v4,
and those of Stable-Baselines3 and SBX if they are installed (benchmark/requirements.txt), with the same
hyperparameters on the dense task. The methods' table: the time of a step for every method of the paper's
Table 3, as a ratio to TD3's. The cores' table: one run, or as many as there are cores, each with one
thread or with as many threads as cores. Everything takes turns; the numbers are medians over the rounds.
Where there is a GPU, the first two tables have its numbers too.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from benchmark.cost import ALGORITHMS, DEVICES, Learner, wait

ROOT = Path(__file__).parents[1]
START, SKIPPED = 1_000, 200  # random steps, and untimed iterations, which include the compilation
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())

METHODS = {"PPO": ("baselines.ppo", ""), "PPO+IL": ("baselines.ppo_il", ""), "LOGO": ("baselines.logo", "")}
for name in ALGORITHMS:  # by their rows in the paper's Table 3
    METHODS[name.upper()] = f"baselines.{name}", ""
    METHODS[f"{name.upper()}+IL"] = f"baselines.{name}_il", ""
    METHODS[f"{name.upper()}+MC"] = f"baselines.meta_critic_{name}", ""
    METHODS[f"{name.upper()}+GILD"] = f"gild_{name}", "--ws-frac 1"
METHODS["DiffAIL"] = "baselines.diffail", ""

# another library's run: prints its steps per second
OTHER = """
import sys, time
import torch
from {library} import {algorithm}
from stable_baselines3.common.callbacks import BaseCallback
torch.set_num_threads({threads})
class Clock(BaseCallback):
    times = []
    def _on_step(self):
        self.times.append(time.perf_counter())
        return True
model = {algorithm}("MlpPolicy", "Hopper-v4", learning_starts={start}, batch_size=256, learning_rate=3e-4,
    train_freq=1, gradient_steps=1, tau=0.005, gamma=0.99, policy_kwargs=dict(net_arch=[256, 256]){more})
model.learn({steps}, callback=Clock())
times = Clock.times[{start} + {skipped}:]
print((len(times) - 1) / (times[-1] - times[0]))
"""


@dataclass
class Args:
    rounds: int = 5  # how often each measurement takes a turn
    iterations: int = 50  # learner iterations per turn
    steps: int = 2_000  # timed environment steps of a run
    threads: int = 1  # CPU threads of a run
    learners: bool = True  # measure the learners' table
    runs: bool = True  # measure the runs' table
    methods: bool = True  # measure the methods' table
    cores: bool = True  # measure the cores' table


def milliseconds(function, iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        function()
    wait()
    return (time.perf_counter() - start) / iterations * 1e3


def learners_table(args: Args) -> str:
    """A row for each algorithm, eager and compiled."""
    kinds = list(product(ALGORITHMS, DEVICES, (False, True)))
    learners = {kind: Learner(*kind[:2], torch.compile if kind[2] else None) for kind in kinds}
    flops, parts = {}, {}
    for (algorithm, device, compiled), learner in learners.items():
        if not flops.get((algorithm, "critic")):
            for with_gild in (False, True):
                with FlopCounterMode(display=False) as counter:
                    learner.iterate(0, with_gild)
                flops[algorithm, with_gild] = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                learner.step_critic()
            flops[algorithm, "critic"] = counter.get_total_flops()
        batch = learner.step_critic()
        parts[algorithm, device, compiled, "critic"] = learner.step_critic
        for with_gild in (False, True):
            parts[algorithm, device, compiled, with_gild] = partial(learner.step_actor, batch, with_gild)
    for device in DEVICES:
        a, b, out = torch.randn(3, 256, 256, device=device)
        parts["sgemm", device] = partial(torch.mm, a, b, out=out)
    times = {key: [] for key in parts}
    for turn in range(args.rounds + 1):
        for key, part in parts.items():
            taken = milliseconds(part, args.iterations)
            if turn:  # the first warms up, and compiles
                times[key].append(taken)
    median = {key: statistics.median(taken) for key, taken in times.items()}
    rate = {device: 2 * 256**3 / median["sgemm", device] for device in DEVICES}  # flops per millisecond
    head = "learner | critic, ms | actor, ms | GILD adds, ms | iteration, ms | share of sgemm | with GILD"
    lines = [f"| {head} |", "|---|---|---|---|---|---|---|"]
    for (algorithm, device, compiled), learner in learners.items():
        every = getattr(learner.args, "policy_frequency", 1)
        critic, actor, gild = (median[algorithm, device, compiled, part] for part in ("critic", False, True))
        vanilla, with_gild = critic + actor / every, critic + gild / every
        cells = [f"{algorithm.upper()}, {device}, {'compiled' if compiled else 'eager'}"]
        cells += [f"{ms:.2f}" for ms in (critic, actor / every, (gild - actor) / every, vanilla)]
        shares = []
        for kind, ms in ((False, vanilla), (True, with_gild)):
            work = flops[algorithm, "critic"] * (1 - 1 / every) + flops[algorithm, kind] / every
            shares.append(f"{work / ms / rate[device]:.0%}")
        cells += [shares[0], f"{with_gild / vanilla:.2f} times as long, {shares[1]}"]
        lines.append(f"| {' | '.join(cells)} |")
    rates = (f"{rate[device] / 1e6:.0f} GFLOP/s on {device}" for device in DEVICES)
    return "\n".join([*lines, f"\nsgemm: {', '.join(rates)}"])


def use_cores(count: int):
    """Confines this process and its children to this many cores: JAX has threads that no option limits."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES[-count:])


def our_speed(args: Args, script: str, flags: str, threads: int, device: str = "cpu") -> float:
    """Steps per second of a script, after its random steps or, on-policy, after its first rollout."""
    total = START + SKIPPED + args.steps
    rollout = getattr(import_module(script).Args(), "num_steps", None)
    flags += f" --total-timesteps {3 * rollout if rollout else total} --eval-frequency 1000000"
    flags += "" if rollout else f" --learning-starts {START}"
    flags += f" --env-id Hopper-v4 --eval-episodes 1 --torch-threads {threads}"
    flags += " --cuda" if device == "cuda" else " --no-cuda"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", script, *flags.split()]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        (run_dir,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run_dir)).Reload().Scalars("charts/SPS")  # one in a hundred iterations
    first, *_, last = (event for event in events if event.step >= START + SKIPPED)
    return (last.step - first.step) / (last.wall_time - first.wall_time)


def gild_speed(args: Args, algorithm: str, ws_frac: int, compiled: bool, **options) -> float:
    """Steps per second of a gild script, with GILD (ws_frac 1) or without (0)."""
    compile = "--compile" if compiled else "--no-compile"
    return our_speed(args, f"gild_{algorithm}", f"--ws-frac {ws_frac} {compile}", **options)


def other_speed(args: Args, algorithm: str, library: str) -> float:
    more = ", ent_coef=0.2" if algorithm == "sac" else ""
    numbers = {"start": START, "skipped": SKIPPED, "steps": START + SKIPPED + args.steps}
    program = OTHER.format(
        library=library, algorithm=algorithm.upper(), threads=args.threads, more=more, **numbers
    )
    one = {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu"}
    if args.threads == 1:
        one["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, env=os.environ | one, check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def runs_table(args: Args) -> str:
    """A row for each algorithm: steps per second."""
    columns, kinds = {}, {}
    for device in DEVICES:
        kinds |= {f"eager, {device}": (False, device), f"compiled, {device}": (True, device)}
    for kind, (compiled, device) in kinds.items():
        for ws_frac in (0, 1):
            ours = partial(
                gild_speed, ws_frac=ws_frac, compiled=compiled, threads=args.threads, device=device
            )
            columns[f"ws-frac {ws_frac}, {kind}"] = ours
    libraries = [library for library in ("stable_baselines3", "sbx") if find_spec(library)]
    for library in libraries:
        columns[library] = partial(other_speed, library=library)
    speeds = {(algorithm, name): [] for algorithm in ALGORITHMS for name in columns}
    for _ in range(args.rounds):
        for (algorithm, name), taken in speeds.items():
            taken.append(columns[name](args, algorithm))
    median = {key: statistics.median(taken) for key, taken in speeds.items()}
    # one per cent of GILD is computed: a run this short would show the compilation after the warm start
    for kind in kinds:
        for algorithm in ALGORITHMS:
            vanilla, gild = (median[algorithm, f"ws-frac {ws_frac}, {kind}"] for ws_frac in (0, 1))
            median[algorithm, f"ws-frac 0.01, {kind}"] = 1 / (0.99 / vanilla + 0.01 / gild)
    names = [f"ws-frac {ws_frac}, {kind}" for kind in kinds for ws_frac in (0, 0.01, 1)] + libraries
    lines = [f"| steps/s | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for algorithm in ALGORITHMS:
        cells = [f"{median[algorithm, name]:.0f}" for name in names]
        lines.append(f"| {algorithm.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def methods_table(args: Args) -> str:
    """A row for each method: its time for a step as a ratio to TD3's, and the paper's Table 3."""
    from benchmark.report import TABLE3

    speeds = {row: [] for row in METHODS}
    for _ in range(args.rounds):
        for row, taken in speeds.items():
            taken.append(our_speed(args, *METHODS[row], args.threads))
    lines = ["| method | ms per step | ratio to TD3 | in the paper, whole runs |", "|---|---|---|---|"]
    for row, taken in speeds.items():
        ratio = statistics.median(td3 / speed for td3, speed in zip(speeds["TD3"], taken, strict=True))
        paper = f"{TABLE3[row] / TABLE3['TD3']:.2f}" if row in TABLE3 else ""
        lines.append(f"| {row} | {1e3 / statistics.median(taken):.2f} | {ratio:.2f} | {paper} |")
    return "\n".join(lines)


def cores_table(args: Args) -> str:
    """Steps per second of all runs together, without GILD."""
    cores = len(CORES)
    use_cores(cores)
    columns = [(runs, threads) for runs in (1, cores) for threads in (1, cores)]
    speeds = {(algorithm, column): [] for algorithm in ALGORITHMS for column in columns}
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(args.rounds):
            for (algorithm, (runs, threads)), taken in speeds.items():
                one = partial(gild_speed, args, ws_frac=0, compiled=False, threads=threads)
                taken.append(sum(pool.map(one, [algorithm] * runs)))
    names = [f"{runs} at once, threads each: {threads}" for runs, threads in columns]
    lines = [f"| steps/s in total | {' | '.join(names)} |", "|---" * (1 + len(columns)) + "|"]
    for algorithm in ALGORITHMS:
        cells = [f"{statistics.median(speeds[algorithm, column]):.0f}" for column in columns]
        lines.append(f"| {algorithm.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args):
    torch.set_num_threads(args.threads)
    use_cores(args.threads)
    tables = {learners_table: args.learners, runs_table: args.runs}
    tables |= {methods_table: args.methods, cores_table: args.cores}
    for table, wanted in tables.items():
        if wanted:
            print(table(args) + "\n", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
