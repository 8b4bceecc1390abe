"""A study that is killed or stopped ends with the results of runs that nothing disturbed, bit for bit."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmark import sweep
from benchmark.report import algorithm
from evaluate import InputError
from tests.conftest import ROOT, call

pytest.importorskip("ray", reason="pip install -r requirements-optional.txt")

FLAGS = """--learning-starts 50 --batch-size 50 --eval-frequency 150 --eval-episodes 1
--checkpoint-frequency 150 --buffer-size 2000"""
TOML = f"""
seeds = 1
flags = '''{FLAGS}'''
[tasks]
Point2D-v0 = 600
[variants]
ddpg = {{ run = "baselines.ddpg", name = "DDPG" }}
ddpg-gild = {{ run = "gild_ddpg --ws-frac 0.5 --gild-init random", name = "DDPG+GILD" }}
"""
VARIANTS = {"ddpg", "ddpg-gild"}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The results of the study's runs, made by the scripts' own command lines."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("expected")
        patch.chdir(folder)
        (folder / "tiny.toml").write_text(TOML)
        results = {}
        for run in sweep.runs_of(sweep.load_study(folder / "tiny.toml")):
            assert call(import_module(run.script), *run.flags)[0] == 0
            results[run.variant] = rows(sweep.measure(sweep.find_run(folder / "runs", run), 600)[0])
        values = [row["q_mean"] for variant in results.values() for row in variant]
        assert "nan" not in values  # though the logs have every other evaluation's step only
        return results


def rows(text):
    """A result without its times."""
    table = list(csv.DictReader(text.splitlines()))
    assert all(float(row.pop("wall_time")) > 0 for row in table)
    return table


processes = []


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    while processes:
        processes.pop().kill()


def start(study, *flags):
    command = [sys.executable, "-m", "benchmark.sweep", str(study), "--results", "results", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes.append(subprocess.Popen(command, cwd=study.parent, env=env, **pipes))
    return processes[-1]


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process):
    end = time.time() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.05)


def log(study, variant, runs="runs"):
    paths = study.parent.glob(f"{runs}/tiny-{variant}-Point2D-1.log")
    return "".join(path.read_text() for path in paths)


def has_checkpoint(study, variant, runs="runs"):
    """Whether a run has written a checkpoint since its start (there is one at step 200, 400, ...)."""
    return "step       300" in log(study, variant, runs)


def results(study):
    paths = {variant: study.parent / f"results/tiny/{variant}-Point2D-1.csv" for variant in VARIANTS}
    return {variant: rows(path.read_text()) for variant, path in paths.items()}


def training_of(study, variant, runs="runs") -> int:
    """The process that trains a run: the child of the worker that its log names."""
    worker = log(study, variant, runs).split("process ")[-1].split()[0]
    (child,) = (ROOT / f"/proc/{worker}/task/{worker}/children").read_text().split()
    return int(child)


def has_pending(pid, number) -> bool:
    """Whether a signal waits for a process that is held by SIGSTOP."""
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def is_alive(pid) -> bool:
    path = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return path.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"  # what nobody has waited for
    return False


def test_a_study_whose_worker_is_killed(study, expected):
    """The kill also ends the training that the worker had started; the study goes on from its checkpoint."""
    process = start(study, "--jobs", "2")
    wait_for(lambda: has_checkpoint(study, "ddpg-gild"), process)
    worker = int(log(study, "ddpg-gild").split()[1])
    os.kill(worker, signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "resumed from step" in log(study, "ddpg-gild") and "resumed" not in log(study, "ddpg")
    assert log(study, "ddpg-gild").count("process ") == 2
    assert results(study) == expected
    assert "2 of 2 runs have a result" in out and "step       600 of 600" in out
    about = json.loads((study.parent / "results/tiny/ddpg-gild-Point2D-1.json").read_text())
    assert about["script"] == "gild_ddpg" and about["args"]["ws_frac"] == 0.5 and about["versions"]["torch"]

    times = [path.stat().st_mtime_ns for path in (study.parent / "results/tiny").iterdir()]
    sweep.main(sweep.Args(study, results=study.parent / "results"))  # there is nothing left to do
    assert times == [path.stat().st_mtime_ns for path in (study.parent / "results/tiny").iterdir()]


def test_a_study_that_is_stopped_and_started_again(study, expected):
    """With one job the second run has not begun when the study is stopped."""
    process = start(study, "--jobs", "1")
    wait_for(lambda: has_checkpoint(study, "ddpg"), process)
    child = training_of(study, "ddpg")
    os.kill(child, signal.SIGSTOP)  # so that it does not end before the signal has reached it
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: has_pending(child, signal.SIGTERM), process)
    os.kill(child, signal.SIGCONT)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM
    assert out.splitlines()[-1].startswith("to resume: python -m benchmark.sweep ")
    assert "stopping: each run finishes its episode" in err
    assert not (study.parent / "results").exists() and not log(study, "ddpg-gild")
    assert "stopping after this episode" in log(study, "ddpg")
    code, out, err = finish(start(study, "--jobs", "2"))
    assert code == 0, err
    assert "resumed from step" in log(study, "ddpg")
    assert results(study) == expected
    _, run = sweep.runs_of(sweep.load_study(study))
    run_dir = sweep.find_run(study.parent / "runs", run)
    # the warm start had 300 iterations
    for steps, share in ((600, 0.5), (1200, 0.25), (300, 1)):
        assert json.loads(sweep.measure(run_dir, steps)[1])["args"]["ws_frac"] == share


def test_a_cluster_of_two_nodes_one_of_which_dies(study, expected, monkeypatch):
    """The nodes train in folders of their own, so the survivor has to get the dead one's checkpoint."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("TMPDIR", str(study.parent))  # where those folders are
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # its sockets need a short path
    local = "gild-*/runs"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        process = start(study, "--address", cluster.address, "--local-disk")
        held = {}

        def both_are_held():
            for variant in VARIANTS - held.keys():
                if has_checkpoint(study, variant, local):
                    held[variant] = training_of(study, variant, local)
                    os.kill(held[variant], signal.SIGSTOP)
            return len(held) == 2

        wait_for(both_are_held, process)
        wait_for(lambda: all("step       150" in log(study, variant) for variant in VARIANTS), process)
        cluster.remove_node(node, allow_graceful=False)
        for child in held.values():
            os.kill(child, signal.SIGCONT)
        code, _, err = finish(process)
        assert code == 0, err
        assert sum("resumed from step" in log(study, variant) for variant in VARIANTS) == 1
        assert results(study) == expected
        assert len(list((study.parent / "runs").glob("*/policies/600.pt"))) == 2  # brought back
    finally:
        cluster.shutdown()


def test_a_later_attempt_replaces_what_the_one_before_had_after_the_checkpoint(tmp_path):
    for attempt, steps in enumerate(([10, 20, 30, 45], [25, 35])):
        writer = SummaryWriter(tmp_path, filename_suffix=f".{attempt}")  # names begin with the second
        for second, step in enumerate(steps, 1):
            writer.add_scalar("some", 100 * attempt + step, step, walltime=1e9 + 1e3 * attempt + second)
        writer.close()
    scalars, seconds = sweep.read_log(tmp_path)
    assert scalars == {"some": {10: 10, 20: 20, 25: 125, 35: 135}}
    assert sorted(seconds) == [0, 10, 20, 25, 35]


def test_a_failed_run_does_not_stop_the_others_and_no_training_outlives_the_sweep(study):
    """Of two runs one fails early; the other one would last for hours, but the sweep is killed."""
    runs = sweep.runs_of(sweep.load_study(study))
    text = TOML.replace("Point2D-v0 = 600", "Point2D-v0 = 600_000").replace("baselines.ddpg", "broken")
    study.write_text(text)
    source = (ROOT / "baselines/ddpg.py").read_text()
    source = source.replace("iteration = global", "assert global_step < 70, 'too far'; iteration = global")
    (study.parent / "broken.py").write_text(source)
    process = start(study, "--jobs", "2")
    wait_for(lambda: "too far" in log(study, "ddpg"), process)
    wait_for(lambda: has_checkpoint(study, "ddpg-gild"), process)
    with pytest.raises(InputError, match="tiny is being run by another process"):
        sweep.lock_study(study.parent / "runs", "tiny", [])
    with pytest.raises(InputError, match="ddpg-gild-Point2D-1 is being run by another study's sweep"):
        sweep.lock_study(study.parent / "runs", "other", runs[1:])
    other = [replace(run, seed=2) for run in runs]
    for lock in sweep.lock_study(study.parent / "runs", "other", other)[1]:
        lock.close()
    child = training_of(study, "ddpg-gild")
    assert is_alive(child)
    process.kill()
    out, _ = process.communicate(timeout=60)
    assert "ddpg-Point2D-1        failed" in out and "ddpg-gild-Point2D-1   failed" not in out
    end = time.time() + 30
    while is_alive(child) and time.time() < end:
        time.sleep(0.1)
    ended = not is_alive(child)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended


# STUDY FILES


def test_the_committed_studies_are_sound():
    for path in (ROOT / "benchmark/studies").glob("*.toml"):
        study = sweep.load_study(path)
        runs = sweep.runs_of(study)
        assert runs or all(variant.elsewhere for variant in study.variants.values()), path
        sweep.check_results(runs, ROOT / "benchmark/results")


def test_runs_come_seed_by_seed(study):
    text = TOML.replace("seeds = 1", "seeds = [3, 1]").replace('name = "DDPG"', 'name = "DDPG", seeds = [1]')
    study.write_text(text.replace("Point2D-v0 = 600", "Point2D-v0 = 600\nHopper-v4 = 800"))
    runs = sweep.runs_of(sweep.load_study(study))
    names = [run.name for run in runs]
    assert names == [
        *("ddpg-Point2D-1", "ddpg-gild-Point2D-1", "ddpg-Hopper-1", "ddpg-gild-Hopper-1"),
        *("ddpg-gild-Point2D-3", "ddpg-gild-Hopper-3"),
    ]
    assert runs[-1].args["total_timesteps"] == 800 and runs[-1].args["ws_frac"] == 0.5
    assert runs[-1].args["batch_size"] == 50 and runs[-1].args["keep_policies"]


def test_a_flag_may_name_the_task(study):
    study.write_text(TOML.replace("--gild-init random", "--demo-path other/{task}.npz"))
    runs = {run.variant: run.args for run in sweep.runs_of(sweep.load_study(study))}
    assert runs["ddpg-gild"]["demo_path"] == "other/Point2D.npz" and "demo_path" not in runs["ddpg"]


def test_what_a_variant_has_of_its_own(study):
    """And what another command makes is reported, but not run."""
    more = 'ppo = { run = "baselines.ppo", flags = "--num-steps 64", steps = 128 }\n'
    study.write_text(TOML + more + 'other = { made_by = "elsewhere --algo td3" }\n')
    loaded = sweep.load_study(study)
    runs = {run.variant: run.args for run in sweep.runs_of(loaded)}
    assert runs.keys() == {"ddpg", "ddpg-gild", "ppo"}
    assert runs["ddpg"]["total_timesteps"] == 600 and runs["ddpg"]["eval_episodes"] == 1
    ppo = runs["ppo"]
    assert (ppo["total_timesteps"], ppo["num_steps"], ppo["eval_episodes"]) == (128, 64, 10)
    assert (algorithm(loaded, "other"), algorithm(loaded, "ddpg-gild")) == ("td3", "ddpg")


MISTAKES = {
    "seeds = 1": ("seed = 1", "a study has no 'seed'; the nearest is 'seeds'"),
    "[tasks]": ("[[tasks]", "tiny.toml: "),
    "seeds = 1\n": ("seeds = 0\n", "tiny.toml has no seeds"),
    "Point2D-v0 = 600": ("Point2D-v0 = '600'", "needs a number of environment steps, not '600'"),
    "Point2D-v0 = 600\n": ("Hopper-v4 = 600\nHopper-v5 = 600\n", "Hopper-v4 and Hopper-v5 would share"),
    "[tasks]\nPoint2D-v0 = 600": ("tasks = ['Point2D-v0']", "tasks is not a table, [tasks]"),
    "Point2D-v0": ("Point3D-v0", "--env-id Point3D-v0"),
    "baselines.ddpg": ("baselines.dpg", "baselines.dpg is not a training script"),
    "gild_ddpg": ("tests.conftest", "tests.conftest is not a training script"),
    "--ws-frac 0.5": ("--ws-fraction 0.5", "gild_ddpg: Unrecognized options: --ws-fraction"),
    "--gild-init random": ("--seed 3", "variant ddpg-gild has --seed, which the sweep sets itself"),
    ', name = "DDPG"': (', steps = "600"', "variant ddpg needs a number of environment steps, not '600'"),
    'name = "DDPG"': ('label = "DDPG"', "variant ddpg has no 'label'"),
    'run = "gild': ('script = "gild', "variant ddpg-gild has no script"),
    "--batch-size 50": ("--batch-size 65", "--batch-size 65 exceeds --learning-starts 50"),
}


@pytest.mark.parametrize("right", MISTAKES)
def test_a_mistake_in_a_study_is_one_line(right, study):
    wrong, words = MISTAKES[right]
    assert right in TOML
    study.write_text(TOML.replace(right, wrong, 1))
    with pytest.raises(InputError) as caught:
        sweep.runs_of(sweep.load_study(study))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_that_is_not_there(tmp_path):
    code, out, err = finish(start(tmp_path / "quik.toml"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "there is no study" in err and "quick" in err
    assert not list(tmp_path.iterdir())


def test_a_study_of_ours_goes_by_its_name():
    named, whole = (
        sweep.load_study(path) for path in ("quick", ROOT / "benchmark" / "studies" / "quick.toml")
    )
    assert named == whole and named.name == "quick"


def test_results_of_other_arguments_are_refused(study):
    (run,) = (r for r in sweep.runs_of(sweep.load_study(study)) if r.variant == "ddpg-gild")
    path = sweep.result(study.parent, "tiny", "ddpg-gild", "Point2D-v0", 1).with_suffix(".json")
    for changes, refused in (
        ({}, False),
        ({"gild_lr": 1e-5}, True),
        ({"total_timesteps": 800}, True),
        ({"cuda": True, "compile": True, "bf16": True}, False),
    ):
        sweep.write(path, json.dumps({"script": run.script, "args": run.args | changes}).encode())
        if refused:
            with pytest.raises(InputError, match=f"with {next(iter(changes))} "):
                sweep.check_results([run], study.parent)
        else:
            sweep.check_results([run], study.parent)
    older = {name: value for name, value in run.args.items() if name != "gild_lr"}
    sweep.write(path, json.dumps({"script": run.script, "args": older}).encode())
    sweep.check_results([run], study.parent)  # made before there was that flag
    with pytest.raises(InputError, match=r"with gild_lr 0\.0001, not 1e-05"):
        sweep.check_results([replace(run, args=run.args | {"gild_lr": 1e-5})], study.parent)
    sweep.write(path, json.dumps({"script": "baselines.ddpg_il", "args": run.args}).encode())
    with pytest.raises(InputError, match=r"by baselines\.ddpg_il, not gild_ddpg"):
        sweep.check_results([run], study.parent)


def test_a_dry_run_lists_and_writes_nothing(study, capsys):
    """An hour of steps at the speed of a result, 0.01 s a step, and half an hour for each of two jobs."""
    study.write_text(TOML.replace("600", "180_000"))
    runs = sweep.runs_of(sweep.load_study(study))
    path = sweep.result(study.parent, "other", "x", "Point2D-v0", 1)
    sweep.write(path.with_suffix(".json"), json.dumps({"script": "gild_ddpg", "args": runs[1].args}).encode())
    sweep.write(path, b"global_step,wall_time\n100,1.5\n200,2\n")
    done = sweep.result(study.parent, "tiny", "ddpg", "Point2D-v0", 1)
    sweep.write(done, b"")
    before = sorted(study.parent.rglob("*"))
    sweep.main(sweep.Args(study, jobs=2, dry_run=True, results=study.parent))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ddpg-Point2D-1       has a result"
    assert lines[1].startswith("ddpg-gild-Point2D-1  180,000 steps, about 0.50 h   gild_ddpg ")
    assert lines[2] == "about 0.2 h, 2 at a time"
    assert sorted(study.parent.rglob("*")) == before


def fake_run(folder, run, step, **changes):
    run_dir = folder / "runs" / f"Point2D-v0__{run.variant}__1__{len(list(folder.glob('runs/*')))}"
    sweep.write(run_dir / "args.json", json.dumps({"args": run.args | changes}).encode())
    sweep.write(run_dir / "evaluations.csv", f"global_step,return_mean,return_std\n{step},1.0,0.0\n".encode())
    sweep.write(run_dir / "checkpoint.pt", b"")
    return run_dir


def test_a_run_is_found_by_its_arguments(study):
    """A shorter run is extended, if its warm start has the same length."""
    _, run = sweep.runs_of(sweep.load_study(study))
    folder = study.parent
    fake_run(folder, run, 600, gild_lr=1e-5)
    fake_run(folder, run, 600, ws_frac=0.4)
    fake_run(folder, run, 400, total_timesteps=400)  # its warm start had 200 iterations
    fake_run(folder, run, 1200, total_timesteps=1200, ws_frac=0.25)  # longer
    assert sweep.find_run(folder / "runs", run) is None
    shorter = fake_run(folder, run, 300, total_timesteps=400, ws_frac=0.75)
    assert sweep.find_run(folder / "runs", run) == shorter
    further = fake_run(folder, run, 500)
    assert sweep.find_run(folder / "runs", run) == further
    to_the_end = replace(run, args=run.args | {"ws_frac": 1.0})
    assert sweep.find_run(folder / "runs", to_the_end) is None
    shorter = fake_run(folder, run, 300, total_timesteps=400, ws_frac=1.0)
    assert sweep.find_run(folder / "runs", to_the_end) == shorter
    annealed = replace(run, args=run.args | {"anneal_lr": True})
    fake_run(folder, annealed, 400, total_timesteps=400, ws_frac=0.75)
    assert sweep.find_run(folder / "runs", annealed) is None  # its learning rate has come to 0
    whole = fake_run(folder, annealed, 300)
    assert sweep.find_run(folder / "runs", annealed) == whole
