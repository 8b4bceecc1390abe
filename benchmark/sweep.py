"""Runs a study, every variant on every task and seed, through Ray on this machine or on a cluster.

    python -m benchmark.sweep benchmark/studies/quick.toml

A study is a TOML file (those in benchmark/studies/ are examples):

    seeds = 5                             # 1 to 5; or a list
    flags = "--eval-frequency 1000"       # further flags of every run
    [tasks]                               # environment steps of a run
    Point2D-v0 = 60_000
    [variants]                            # a script, by its module's name, and its flags; and a name
    td3 = { run = "baselines.td3", name = "TD3" }
    td3-gild = { run = "gild_td3 --ws-frac 1", name = "TD3+GILD to the end" }

A variant can have its own seeds, tasks, steps, and flags in place of the study's; {task} in a flag is the
task's name (`--demo-path mine/{task}.npz`). With `made_by` instead of `run` its results come from a command
of their own, and the sweep leaves it alone.

A run trains in the folder runs/ of the working directory, and its output goes to
runs/STUDY-VARIANT-TASK-SEED.log. Its result is benchmark/results/STUDY/VARIANT-TASK-SEED.csv, a row per
evaluation, and a .json beside it with its arguments. Ctrl-C and SIGTERM let each run finish its episode and
write a checkpoint. The same command resumes the study: it skips the runs that have a result and resumes those
that have a checkpoint.

With --address, runs are spread over a Ray cluster that this machine belongs to. Each node needs the
repository, in the same place, and its packages. A node that cannot reach runs/ trains in a temporary folder
and copies it back at each checkpoint, so that another node can resume from there.
"""

import contextlib
import csv
import difflib
import io
import json
import logging
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
import zlib
from collections import deque
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tqdm import tqdm

from baselines.common import DemonstrationBuffer, evaluate, last_evaluation, task_name
from evaluate import InputError, command_line, load_policy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmark" / "results"
STUDY_KEYS = {"seeds", "flags", "tasks", "variants", "baseline", "scores", "panels"}
VARIANT_KEYS = {"run", "made_by", "name", "seeds", "tasks", "steps", "flags", "paper"}
OWN_FLAGS = ["--exp-name", "--env-id", "--seed", "--total-timesteps", "--keep-policies", "--resume"]
ASSUMED_SPEED = 100  # environment steps per second, where no result says otherwise


@dataclass
class Args:
    study: tyro.conf.Positional[Path]  # a TOML file, or the name of one in benchmark/studies
    jobs: int | None = None  # runs at a time, each of one thread; None: one per CPU core
    address: str | None = None  # a Ray cluster to run on, such as auto or 10.0.0.1:6379; None: this machine
    local_disk: bool = False  # train in each node's temporary folder even where runs/ can be reached
    dry_run: bool = False  # list what would run, and about how long, and end
    results: Path = RESULTS  # folder of the results

    def __post_init__(self):
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs} is less than 1")


# STUDIES


@dataclass
class Variant:
    script: str  # its module's name
    flags: list[str]
    name: str  # in tables and figures
    seeds: list[int]
    tasks: list[str]  # env ids
    steps: int | None  # environment steps of a run; None: the task's
    paper: str | None  # its row in the paper's tables, such as TD3+GILD or TD3+GILD+1%ws
    elsewhere: bool  # its results are made by another command, not by a sweep


@dataclass
class Study:
    name: str
    tasks: dict[str, int]  # environment steps of a run, by env id
    variants: dict[str, Variant]
    # for the report
    baseline: str  # the variant that the others are compared with
    scores: list[str]  # the scores in its table
    panels: list[str]  # the columns of a result that it draws


@dataclass
class Run:
    study: str
    variant: str
    env_id: str
    seed: int
    script: str
    flags: list[str]
    args: dict  # what the script makes of the flags

    @property
    def name(self) -> str:
        return f"{self.variant}-{task_name(self.env_id)}-{self.seed}"


def known(path, what: str, keys, allowed):
    """Refuses a key that is not allowed, and names the nearest that is."""
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1, 0) or [""]
            raise InputError(f"{path}: {what} has no {key!r}; the nearest is {near[0]!r}")


def seed_list(path, seeds) -> list[int]:
    seeds = list(range(1, seeds + 1)) if type(seeds) is int else seeds
    if type(seeds) is not list or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: seeds {seeds} is neither a number of seeds nor a list of them")
    return seeds


def load_study(path: Path) -> Study:
    """Reads a study's TOML file. Whatever is misspelt in it ends in an InputError."""
    path = Path(path)
    if not path.is_file() and (ours := ROOT / "benchmark" / "studies" / f"{path}.toml").is_file():
        path = ours
    if not path.is_file():
        studies = ", ".join(sorted(path.stem for path in (ROOT / "benchmark" / "studies").glob("*.toml")))
        raise InputError(f"there is no study {path}; benchmark/studies has {studies}")
    try:
        toml = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    known(path, "a study", toml, STUDY_KEYS)
    for key in ("seeds", "tasks", "variants"):
        if not toml.get(key):
            raise InputError(f"{path} has no {key}")
    for key in ("tasks", "variants"):
        if type(toml[key]) is not dict:
            raise InputError(f"{path}: {key} is not a table, [{key}]")
    tasks, variants = toml["tasks"], {}
    names = [task_name(env_id) for env_id in tasks]
    if twice := [env_id for env_id in tasks if names.count(task_name(env_id)) > 1]:
        raise InputError(f"{path}: {' and '.join(twice)} would share their results' names; make two studies")

    def check_steps(what, steps):
        if type(steps) is not int:
            raise InputError(f"{path}: {what} needs a number of environment steps, not {steps!r}")

    for env_id, steps in tasks.items():
        check_steps(f"task {env_id}", steps)
    for key, entry in toml["variants"].items():
        if not re.fullmatch(r"[\w.-]+", key):
            raise InputError(f"{path}: variant {key!r} cannot be part of a file's name")
        run = entry.get("run") or entry.get("made_by") if type(entry) is dict else None
        if not run:
            raise InputError(
                f'{path}: variant {key} has no script; it needs {{ run = "gild_td3 --ws-frac 1" }}'
            )
        known(path, f"variant {key}", entry, VARIANT_KEYS)
        known(path, f"variant {key}", entry.get("tasks", []), tasks)
        check_steps(f"variant {key}", entry.get("steps", 1))
        shared = "" if "made_by" in entry else entry.get("flags", toml.get("flags", ""))
        script, *flags = f"{run} {shared}".split()
        variants[key] = Variant(
            script=script,
            flags=flags,
            name=entry.get("name", key),
            seeds=seed_list(path, entry.get("seeds", toml["seeds"])),
            tasks=entry.get("tasks", list(tasks)),
            steps=entry.get("steps"),
            paper=entry.get("paper"),
            elsewhere="made_by" in entry,
        )
    baseline = toml.get("baseline", next(iter(variants)))
    known(path, "the study", [baseline], variants)
    scores = toml.get("scores", ["best evaluation", "last evaluation", "mean of the second half"])
    return Study(path.stem, tasks, variants, baseline, scores, toml.get("panels", ["return_mean"]))


def parse(script: str, flags: list[str], try_task: bool) -> dict:
    """The arguments that a script makes of its flags. With `try_task` their environment is made once."""
    try:
        module = import_module(script)
        Args, make_env = module.Args, module.make_env
    except (ImportError, AttributeError) as error:
        raise InputError(f"{script} is not a training script ({error})") from None
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            args = tyro.cli(Args, args=flags)
            if try_task:
                make_env(args, training=True).close()
    except SystemExit:  # tyro has printed a box, with its reason between the first two rules
        reason = " ".join(re.split("[-─]{5,}", box.getvalue())[1].replace("│", " ").split())
        raise InputError(f"{script}: {reason}") from None
    except ValueError as error:  # the script's InputError
        raise InputError(f"{script}: {error}") from None
    return asdict(args)


def runs_of(study: Study) -> list[Run]:
    """Seed by seed, so that an unfinished study compares all variants on the seeds that it has."""
    runs, tried = [], set()
    for seed in sorted({seed for variant in study.variants.values() for seed in variant.seeds}):
        for env_id, steps in study.tasks.items():
            for key, variant in study.variants.items():
                if variant.elsewhere or seed not in variant.seeds or env_id not in variant.tasks:
                    continue
                if given := [flag for flag in variant.flags if flag.split("=")[0] in OWN_FLAGS]:
                    raise InputError(f"variant {key} has {given[0]}, which the sweep sets itself")
                own = [flag.replace("{task}", task_name(env_id)) for flag in variant.flags]
                flags = ["--no-cuda", *own, "--exp-name", key, "--env-id", env_id]
                flags += ["--seed", str(seed), "--total-timesteps", str(variant.steps or steps)]
                flags += ["--keep-policies"]
                args = parse(variant.script, flags, env_id not in tried)
                tried.add(env_id)
                runs.append(Run(study.name, key, env_id, seed, variant.script, flags, args))
    return runs


def result(results: Path, study: str, variant: str, env_id: str, seed: int) -> Path:
    """The CSV file of a run. The oldest studies, of one task each, left the task out of its name."""
    path = results / study / f"{variant}-{task_name(env_id)}-{seed}.csv"
    oldest = results / study / f"{variant}-{seed}.csv"
    return oldest if oldest.exists() and not path.exists() else path


def find_run(runs: Path, run: Run) -> Path | None:
    """The folder of a run in the folder `runs`, finished or not; of several the one that got furthest.

    A shorter run with the same arguments is one too, if its warm start is as long, or to the end, and nothing
    else of it depends on its length: it is extended.
    """
    scheduled = run.args.get("anneal_lr") or run.args.get("release") == "linear"

    def warm_start(args):
        share = args.get("ws_frac", 0)
        return math.inf if share == 1 else round(share * args["total_timesteps"])

    def same(run_dir):
        args = json.loads((run_dir / "args.json").read_text())["args"]
        free = {"total_timesteps", "ws_frac", "resume", "track", "wandb_project_name"}
        return (
            args.keys() == run.args.keys()
            and all(args[key] == run.args[key] for key in args.keys() - free)
            and args["total_timesteps"] <= run.args["total_timesteps"]
            and (not scheduled or args["total_timesteps"] == run.args["total_timesteps"])
            and warm_start(args) == warm_start(run.args)
        )

    env_id = run.env_id.replace(":", "-").replace("/", "-")
    paths = runs.glob(f"{env_id}__{run.variant}__{run.seed}__*/checkpoint.pt")
    return max((path.parent for path in paths if same(path.parent)), key=last_evaluation, default=None)


# A RUN'S RESULT


def read_log(run_dir: Path) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """A run's TensorBoard log: its scalars by name and step, and the seconds of training up to each step.

    A resumed run has a file per attempt. Later ones replace what came after the checkpoint, and the time in
    between does not count.
    """
    scalars, seconds = {}, {0: 0.0}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        events = list(LegacyEventFileLoader(str(path)).Load())
        values = [event for event in events if event.HasField("summary")]
        if not values:
            continue
        first = min(event.step for event in values)
        for logged in (seconds, *scalars.values()):
            for step in [step for step in logged if step >= max(first, 1)]:
                del logged[step]
        before = seconds[max(seconds)]
        for event in values:
            seconds[event.step] = before + event.wall_time - events[0].wall_time
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars, seconds


COLUMNS = "global_step,return_mean,return_std,q_mean,sparse_return,imitation_distance,lowest_of_batches,"
COLUMNS += "rewarded_episodes,f_mean,f_slope,wall_time"


def measure(run_dir: Path, total_timesteps: int, stopped=lambda: False) -> tuple[str, str] | None:
    """A finished run's result as CSV and JSON texts; None if `stopped()` says so in between.

    A row has the evaluation's mean and std, what the logs say (the critic's mean value, the lowest imitation
    error of a batch so far, the episodes with a reward so far, the mean of f and its slope, the seconds), and
    what the kept policy shows: its mean sparse return from the same starts, and its mean squared distance to
    the demonstrated actions. What a script does not have is nan.
    """
    scalars, seconds = read_log(run_dir)
    actor, script, args, _ = load_policy(run_dir / "policy.pt")
    env = script.make_env(args, training=True)  # with the sparse reward
    algorithm = next((name for name in ("ddpg", "td3") if name in script.__name__), "sac")
    path = Path(args.demo_path or "") if getattr(args, "demo_path", None) else None
    path = path or ROOT / "demos" / f"{task_name(args.env_id)}-{algorithm}.npz"
    demonstrations = None
    if path.exists():
        demonstrations = DemonstrationBuffer(path, args.env_id, env, torch.device("cpu"))
    rewarded = [step for step, value in scalars.get("charts/episodic_return", {}).items() if value]
    errors, nan = scalars.get("charts/imitation_distance", {}), float("nan")
    rows = [COLUMNS.split(",")]
    for row in csv.DictReader((run_dir / "evaluations.csv").read_text().splitlines()):
        step, distance = int(row["global_step"]), nan

        def logged(name, step=step):  # losses are logged at every 100th iteration
            values = scalars.get(name, {})
            return values.get(max((at for at in values if step - 100 < at <= step), default=None), nan)

        if stopped():
            return None
        if step > total_timesteps:  # the run was extended since
            break
        policy = torch.load(run_dir / "policies" / f"{step}.pt", weights_only=True, map_location="cpu")
        actor.load_state_dict(policy["actor"])
        if demonstrations:
            actions = script.act(actor, demonstrations.obs.numpy())
            distance = np.square(actions - demonstrations.actions.numpy()).mean()
        sparse_return = evaluate(script.act, actor, env, args.eval_episodes, seed=args.seed + 100).mean()
        numbers = [float(row["return_mean"]), float(row["return_std"])]
        numbers += [logged("losses/qf1_values"), sparse_return, distance]
        numbers += [min((error for at, error in errors.items() if at <= step), default=nan)]
        numbers += [sum(end <= step for end in rewarded)]
        numbers += [
            logged("losses/gild_loss"),
            logged("losses/gild_action_grad_norm"),
            seconds.get(step, nan),
        ]
        rows.append([step, *(f"{number:.6g}" for number in numbers)])
    env.close()
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    about = json.loads((run_dir / "args.json").read_text())
    if about["args"].get("ws_frac", 1) < 1:  # an extended run's warm start kept its length
        iterations = round(about["args"]["ws_frac"] * about["args"]["total_timesteps"])
        about["args"]["ws_frac"] = min(1.0, iterations / total_timesteps)
    about["args"] |= {"total_timesteps": total_timesteps, "resume": None}
    return text.getvalue(), json.dumps({"script": script.__name__, **about}, indent=2) + "\n"


# A RUN, ON WHICHEVER NODE


def child():
    """The training process: a script's command line, which ends when the process that started it does."""

    def watch():
        while os.read(0, 1):  # standard input is a pipe that nobody writes to
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def write(path: Path, data: bytes):
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def log_path(folder: Path, run: Run) -> Path:
    return folder / "runs" / f"{run.study}-{run.name}.log"


def files(folder: Path, run: Run, seen: dict) -> dict[str, bytes]:
    """A run's files under `folder` that are not as `seen` remembers them, by their path from there."""
    run_dir, changed = find_run(folder / "runs", run), {}
    # in this order the checkpoint comes before the log and the policies, which then reach as far or further
    for path in [*(sorted(run_dir.rglob("*")) if run_dir else []), log_path(folder, run)]:
        if path.is_file() and path.suffix != ".tmp":
            name, state = str(path.relative_to(folder)), path.stat().st_mtime_ns
            if seen.get(name) != state:
                seen[name], changed[name] = state, path.read_bytes()
    return changed


class Head:
    """A Ray actor on the node of the command: what the runs tell it, and their files."""

    def __init__(self, folder: str):
        self.folder, self.progress, self.stopping = Path(folder), {}, False

    def tell(self, name: str, *progress) -> bool:
        """Notes a run's step, return and steps per second. Returns whether the run shall stop."""
        if progress:
            self.progress[name] = progress
        return self.stopping

    def look(self) -> dict[str, tuple]:
        return self.progress

    def stop(self):
        self.stopping = True

    def fetch(self, run: Run) -> dict[str, bytes]:
        return files(self.folder, run, {})

    def bring(self, contents: dict[str, bytes]):
        for name, data in contents.items():
            write(self.folder / name, data)


def work(run: Run, home: str, token: str, local_disk: bool, head) -> tuple:
    """A Ray task: trains a run, or resumes it, and measures it.

    Returns ("finished", CSV, JSON), ("stopped",) or ("failed", reason). If this process or its node dies, Ray
    starts the task again, and it resumes.
    """
    import ray

    def tell(*progress):
        return ray.get(head.tell.remote(run.name, *progress))

    if tell():
        return ("stopped",)
    torch.set_num_threads(1)
    lock, seen = Path(home, "runs", f"{run.study}.lock"), {}
    with contextlib.ExitStack() as stack:
        if local_disk or not lock.exists() or lock.read_text() != token:  # another machine's disk
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gild-")))
            for name, data in ray.get(head.fetch.remote(run)).items():
                write(folder / name, data)
            files(folder, run, seen)

            def bring():
                ray.get(head.bring.remote(files(folder, run, seen)))

        else:
            folder, bring = Path(home), lambda: None
        outcome = train(run, folder, tell, bring)
        bring()
        if outcome[0] != "finished":
            return outcome
        measured = measure(find_run(folder / "runs", run), run.args["total_timesteps"], tell)
        return ("finished", *measured) if measured else ("stopped",)


def train(run: Run, folder: Path, tell, bring) -> tuple:
    """Trains a run under `folder` to its end. `bring()` is called after each checkpoint."""
    run_dir = find_run(folder / "runs", run)
    if run_dir and last_evaluation(run_dir) >= run.args["total_timesteps"]:
        return ("finished",)
    resume = run_dir and ["--resume", str(run_dir), "--total-timesteps", str(run.args["total_timesteps"])]
    command = [sys.executable, "-u", "-m", "benchmark.sweep", "--child", run.script, *(resume or run.flags)]
    log = log_path(folder, run)
    log.parent.mkdir(exist_ok=True)
    marks, brought, stopping = [], None, False
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "a") as file:
        print(f"process {os.getpid()} starts {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,  # closed when this process dies
            stdout=file,
            stderr=file,
            start_new_session=True,  # so that Ctrl-C reaches it through `stop` only
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            if run_dir := run_dir or find_run(folder / "runs", run):
                checkpoint = (run_dir / "checkpoint.pt").stat().st_mtime_ns
                if checkpoint != brought:
                    bring()
                    brought = checkpoint
            step, score = progress(run_dir)
            if not marks or step < marks[-1][0]:  # a resumed run goes back to its checkpoint
                marks = [(step, time.time())]
            elif step > marks[-1][0]:
                marks.append((step, time.time()))
            (step0, t0), (step1, t1) = marks[0], marks[-1]
            if tell(step, score, (step1 - step0) / max(t1 - t0, 1e-3)) and not stopping:
                process.terminate()
                stopping = True
    finally:
        process.kill()
        code = process.wait()
    if code == 0:
        return ("finished",)
    if stopping:
        return ("stopped",)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = f"killed by signal {-code}" if code < 0 else lines[-1]
    return ("failed", f"{reason} ({log.relative_to(folder)})")


def progress(run_dir: Path | None) -> tuple[int, float]:
    """The step and the mean return of a run's last evaluation."""
    path = run_dir / "evaluations.csv" if run_dir else None
    if not path or not path.exists():
        return 0, float("nan")
    step, score, _ = path.read_text().splitlines()[-1].split(",")
    return int(step), float(score)


# THE STUDY

received_signals = []


def note_signal(number, frame):
    """Signal handler: the runs finish their episodes. A second signal ends them at once."""
    received_signals.append(number)
    signal.signal(number, lambda number, frame: sys.exit(128 + number))
    print("stopping: each run finishes its episode; Ctrl-C again stops at once", file=sys.stderr)


class Display:
    """A bar over all runs; a line per run, in place on a terminal, at every tenth of its steps elsewhere."""

    def __init__(self, study: str, todo: list[Run], steps: dict[str, int], runs: int):
        """`steps` has the steps that earlier sittings made of each run to do."""
        self.ends = {run.name: run.args["total_timesteps"] for run in todo}
        self.steps, self.lines, self.width = steps, {}, max(map(len, steps))
        self.runs, self.finished = runs, runs - len(todo)
        initial, total = sum(steps.values()), sum(self.ends.values())
        self.bar = tqdm(desc=study, total=total, initial=initial, unit=" steps", disable=None)

    def show(self, name: str, step: int, score: float, rate: float):
        before, self.steps[name] = self.steps[name], step
        line = f"{name:{self.width}}   step {step:>9,} of {self.ends[name]:,}   return {score:8.1f}"
        line += f"   {rate:4.0f} steps/s"
        if not self.bar.disable:
            if name not in self.lines:
                self.lines[name] = tqdm(bar_format="{desc}", position=1 + len(self.lines), leave=False)
            self.lines[name].set_description_str(line)
        elif 10 * step // self.ends[name] > 10 * before // self.ends[name]:
            print(line, flush=True)
        self.bar.n = sum(self.steps.values())
        self.bar.refresh()

    def end(self, name: str, outcome: str):
        self.finished += outcome == "finished"
        if name in self.lines:
            self.lines.pop(name).close()
        tqdm.write(f"{name:{self.width}}   {outcome}; {self.finished} of {self.runs} runs have a result")
        sys.stdout.flush()


def lock_study(folder: Path, study: str, todo: list[Run]) -> tuple[str, list[io.TextIOWrapper]]:
    """Locks the study, so that it is not run twice at a time, and its runs, which another may have in common.

    Returns the text of the study's lock, and the open files.
    """
    folder.mkdir(exist_ok=True)
    file, shared = (open(folder / f"{name}.lock", "a+") for name in (study, "all"))  # noqa: SIM115
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{study} is being run by another process ({file.name} is locked)") from None
        for run in todo:
            place = zlib.crc32(f"{run.env_id}__{run.variant}__{run.seed}".encode())  # a byte to lock
            try:
                fcntl.lockf(shared, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                raise InputError(f"{run.name} is being run by another study's sweep") from None
    token = uuid.uuid4().hex
    file.truncate(0)
    file.write(token)
    file.flush()
    return token, [file, shared]


def seconds_per_step(results: Path) -> dict[tuple[str, str], float]:
    """What the results say of the time of a step, by script and task."""
    times = {}
    for path in results.glob("*/*.json"):
        about, rows = json.loads(path.read_text()), path.with_suffix(".csv").read_text().splitlines()
        last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        key = about["script"], task_name(about["args"]["env_id"])
        if last["wall_time"] != "nan":  # as in a batch
            times.setdefault(key, []).append(float(last["wall_time"]) / int(last["global_step"]))
    return {key: float(np.mean(values)) for key, values in times.items()}


def list_runs(runs: list[Run], folder: Path, results: Path, jobs: int):
    """Prints what would run, and about how long."""
    speeds, total, assumed = seconds_per_step(results), 0.0, False
    width = max(len(run.name) for run in runs)
    for run in runs:
        run_dir = find_run(folder / "runs", run)
        step, steps = last_evaluation(run_dir) if run_dir else 0, run.args["total_timesteps"]
        if result(results, run.study, run.variant, run.env_id, run.seed).exists():
            print(f"{run.name:{width}}  has a result")
            continue
        time_per_step = speeds.get((run.script, task_name(run.env_id)))
        assumed |= time_per_step is None
        hours = (steps - min(step, steps)) * (time_per_step or 1 / ASSUMED_SPEED) / 3600
        total += hours
        start = f"from step {step:,} to {steps:,}" if step else f"{steps:,} steps"
        print(f"{run.name:{width}}  {start}, about {hours:.2f} h   {run.script} {' '.join(run.flags)}")
    note = f" ({ASSUMED_SPEED} steps per second assumed where no result has a time)" if assumed else ""
    print(f"about {total / jobs:.1f} h, {jobs} at a time{note}")


def check_results(runs: list[Run], results: Path):
    """Refuses to count a result that other arguments made, but for those that a machine is fast with."""
    for run in runs:
        path = result(results, run.study, run.variant, run.env_id, run.seed).with_suffix(".json")
        if not path.exists():
            continue
        saved = json.loads(path.read_text())
        if saved["script"] != run.script:
            raise InputError(f"{path} was made by {saved['script']}, not {run.script}; rename the variant")
        defaults = parse(run.script, [], try_task=False)
        for name, value in run.args.items():
            old = saved["args"].get(name, defaults[name])  # a flag may be newer than the result
            if name == "ws_frac":  # what counts is the warm start's length
                old, value = (round(share * run.args["total_timesteps"]) for share in (old, value))
            if name not in ("cuda", "compile", "bf16") and old != value:
                raise InputError(f"{path} was made with {name} {old}, not {value}; rename the variant")


def main(args: Args):
    study = load_study(args.study)
    runs, folder = runs_of(study), Path.cwd()
    check_results(runs, args.results)
    todo = [r for r in runs if not result(args.results, r.study, r.variant, r.env_id, r.seed).exists()]
    if args.dry_run:
        return list_runs(runs, folder, args.results, args.jobs or os.cpu_count())
    if not todo:
        print(f"{study.name} is complete: python -m benchmark.report {study.name}")
        return None
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # runs with --cuda see the GPUs
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise InputError(f"a sweep needs Ray: pip install -r requirements-optional.txt ({error})") from None
    token, locks = lock_study(folder / "runs", study.name, todo)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if args.address:
            ray.init(args.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, **quiet)
        else:
            jobs = args.jobs or os.cpu_count()
            ray.init("local", num_cpus=jobs, include_dashboard=False, object_store_memory=10**8, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray at --address {args.address}: {error}") from None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    head = ray.remote(num_cpus=0, scheduling_strategy=here)(Head).remote(str(folder))
    task = ray.remote(num_cpus=1, max_retries=10)(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    steps = {run.name: progress(find_run(folder / "runs", run))[0] for run in todo}
    display, waiting, pending, failed = Display(study.name, todo, steps, len(runs)), deque(todo), {}, {}
    while pending or (waiting and not received_signals):
        jobs = args.jobs or int(ray.cluster_resources().get("CPU", 1))  # a cluster can grow
        while waiting and len(pending) < jobs and not received_signals:
            run = waiting.popleft()
            pending[task.remote(run, str(folder), token, args.local_disk, head)] = run
        if received_signals:
            head.stop.remote()
        done, _ = ray.wait(list(pending), timeout=1)
        for name, state in ray.get(head.look.remote()).items():
            if name in {run.name for run in pending.values()}:
                display.show(name, *state)
        for reference in done:
            run = pending.pop(reference)
            try:
                outcome, *more = ray.get(reference)
            except ray.exceptions.RayError as error:
                outcome, more = "failed", [str(error).splitlines()[-1]]
            if outcome == "finished":
                path = result(args.results, study.name, run.variant, run.env_id, run.seed)
                write(path.with_suffix(".json"), more[1].encode())
                write(path, more[0].encode())
            elif outcome == "failed":
                failed[run.name] = more[0]
            display.end(run.name, outcome)
    display.bar.close()
    ray.shutdown()
    for lock in locks:
        lock.close()
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    if received_signals:
        print(f"to resume: python -m benchmark.sweep {shlex.join(sys.argv[1:])}")
        sys.exit(128 + received_signals[0])
    if failed:
        sys.exit(1)
    print(f"tables and figures: python -m benchmark.report {args.study}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    else:
        from benchmark import sweep  # under its own name, so that Ray's workers import it

        command_line(sweep.main, sweep.Args)
