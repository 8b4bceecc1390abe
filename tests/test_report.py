"""The statistics against independent computations, reports of made-up results, and the pieces of Figure 4."""

import itertools
import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch

from baselines import sac
from benchmark import figure4, report, sweep
from benchmark.report import bootstrap, compared_with, half_width, improvement, iqm, profile, t_quantile
from tests.conftest import ROOT, call

TOML = """
seeds = 3
panels = ["return_mean", "f_slope"]
[tasks]
Hopper-v4 = 40_000
Walker2d-v4 = 40_000
[variants]
td3 = { run = "baselines.td3", name = "TD3", paper = "TD3" }
td3-gild-1 = { run = "gild_td3 --ws-frac 0.01", name = "TD3+GILD 1 %", paper = "TD3+GILD+1%ws" }
td3-gild-10 = { run = "gild_td3 --ws-frac 0.1", name = "TD3+GILD 10 %", seeds = [2] }
td3-gild = { run = "gild_td3 --ws-frac 1", name = "TD3+GILD", paper = "TD3+GILD" }
intuitive = { run = "gild_td3 --ws-frac 1 --meta-loss intuitive", name = "intuitive" }
"""
# a run's evaluations, and what is added to them on the second task
RETURNS = {
    "td3": ([0, 100, 200, 300], [0, 100, 300, 500], [0, 0, 0, 1000]),
    "td3-gild-1": ([0, 300, 500, 400], [0, 100, 700, 500], [0, 0, 900, 900]),
    "td3-gild-10": (None, [9, 9, 9, 9], None),
    "td3-gild": ([0, 400, 600, 400], None, None),
    "intuitive": ([0, 500, 100, 100], None, None),
}


@pytest.fixture
def study(tmp_path):
    """A study with results of every kind: older ones without the newer columns, and missing ones."""
    path = tmp_path / "made.toml"
    path.write_text(TOML)
    for key, seeds in RETURNS.items():
        for seed, returns in enumerate(seeds, 1):
            for env_id, more in (("Hopper-v4", 0), ("Walker2d-v4", 1000)):
                if returns:
                    write_result(tmp_path, key, env_id, seed, np.add(returns, more), old=key == "intuitive")
    return path


def write_result(results, key, env_id, seed, returns, old):
    columns = ["global_step", "return_mean", "return_std", "q_mean", "sparse_return", "imitation_distance"]
    columns += ["f_slope", "wall_time"]
    columns = columns[:6] if old else columns
    rows = [",".join(columns)]
    for i, value in enumerate(returns, 1):
        numbers = [10_000 * i, value, 1, "nan", value / 2, 0.1, 0.2, i * 100 * (1 + key.endswith("gild"))]
        rows.append(",".join(map(str, numbers[: len(columns)])))
    sweep.write(sweep.result(results, "made", key, env_id, seed), "\n".join(rows).encode())


def run_report(study, *flags):
    return call_tool(
        report, str(study), "--results", study.parent, "--figures", study.parent / "figures", *flags
    )


class Tool:
    """What conftest's `call` needs to run a tool's command line as it runs a script's."""

    def __init__(self, module):
        self.__name__, self.train, self.Args, self.received_signals = (
            module.__name__,
            module.main,
            module.Args,
            [],
        )

    def main(self, main, args):
        from evaluate import command_line

        command_line(main, args)


def call_tool(module, *flags):
    return call(Tool(module), *flags)


def rows_of(text, title):
    lines = text.split(f"**{title}")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


# STATISTICS


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (60, 2.000)]
)
def test_students_t(freedom, expected):
    assert abs(t_quantile(freedom) - expected) < 2e-3


def test_the_interval_of_a_mean():
    assert abs(half_width([1.0, 2.0, 3.0]) - 4.303 / math.sqrt(3)) < 1e-3


def test_interquartile_mean():
    """Eight runs over two tasks: the two lowest and the two highest of all do not count."""
    assert iqm([np.array([-99.0, 1, 2, 3]), np.array([4.0, 5, 100, 200])]) == (2 + 3 + 4 + 5) / 4
    assert iqm([np.array([1.0, 2, 6])]) == 3  # a quarter of three runs is none


def test_probability_of_improvement():
    """Of all pairs the share won, a tie being half a win; mean over the tasks."""
    x, y = [np.array([1.0, 2, 3]), np.array([5.0])], [np.array([2.0, 0]), np.array([6.0, 1])]
    wins = [
        [(a > b) + (a == b) / 2 for a, b in itertools.product(xs, ys)] for xs, ys in zip(x, y, strict=True)
    ]
    expected = np.mean([np.mean(won) for won in wins])
    assert improvement(x, y) == expected == (4.5 / 6 + 1 / 2) / 2
    assert improvement(y, x) == 1 - expected and improvement(x, x) == 0.5


def test_performance_profile():
    tasks = [np.array([10.0, 20]), np.array([20.0, 40])]
    assert profile(tasks, np.array([0, 10, 20, 39, 40])).tolist() == [1, 0.75, 0.25, 0.25, 0]


def test_bootstrap_is_stratified():
    """Every task keeps its number of runs: tasks of equal runs leave nothing to chance."""
    tasks = [np.full(3, 1.0), np.full(5, 100.0)]
    assert bootstrap(lambda t: np.concatenate(t).mean(), tasks, repetitions=50).tolist() == [62.875, 62.875]


def test_bootstrap_against_all_resamples():
    """Of three runs there are 27 resamples; the percentiles of their means are known."""
    scores = np.array([0.0, 1.0, 5.0])
    means = [np.mean(draw) for draw in itertools.product(scores, repeat=3)]
    expected = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    assert np.allclose(bootstrap(lambda t: t[0].mean(), [scores], repetitions=4_000), expected)
    low, high = bootstrap(improvement, [scores], [scores + 0.5])
    assert 0 <= low < improvement([scores], [scores + 0.5]) < high <= 1


# THE REPORT


def test_scores_of_a_run():
    steps, returns = [5, 10, 15, 20, 25, 30], [1.0, 7.0, 2.0, 3.0, 5.0, 4.0]
    columns = [("global_step", int), ("return_mean", float)]
    run = np.array([*zip(steps, returns, strict=True)], columns)
    values = {
        name: report.SCORES[name](run) for name in report.SCORES if "return" not in name and "mean" in name
    }
    assert values["mean of the last five"] == 4.2 and values["mean of the second half"] == 4
    assert report.SCORES["best evaluation"](run) == 7 and report.SCORES["last evaluation"](run) == 4
    for rows in (run, run[:5]):  # with a row for step 0 or without: the same half
        with_start = np.concatenate([np.array([(0, 9.0)], columns), rows])
        assert report.SCORES[report.SECOND_HALF](with_start) == report.SCORES[report.SECOND_HALF](rows)


def test_numbers_have_no_meaningless_digits():
    assert list(map(report.plain, (11161.4, -853.2, 83.8333, 0.002, -0.04))) == [
        "11161",
        "-853",
        "83.8",
        "0.0",
        "0.0",
    ]


def test_report_of_made_up_results(study):
    code, out, err = run_report(study)
    assert (code, err) == (0, "")
    table = {(row[0], row[1]): row[2:] for row in rows_of(out, "Mean ± std")[1:]}
    assert len(table) == 10
    best = [300, 500, 1000]
    low, high = np.mean(best) - half_width(best), np.mean(best) + half_width(best)
    assert table["Hopper", "TD3"][:2] == ["3", f"600 ± {np.std(best, ddof=1):.0f} [{low:.0f}, {high:.0f}]"]
    assert (
        table["Hopper", "TD3"][-1] == "1320.8 ± 413.9"
        and table["Walker2d", "TD3+GILD 1 %"][-1] == "4113.6 ± 280.5"
    )
    assert table["Hopper", "TD3+GILD 10 %"] == ["1", "9.0", "9.0", "9.0", ""]  # one seed: no interval

    paired = {(row[0], row[1]): row[2:] for row in rows_of(out, "Paired differences")[1:]}
    gain = [450 - 250, 600 - 400, 900 - 500]  # means of the second half
    assert paired["Hopper", "TD3+GILD 1 %"][:3] == [
        "TD3",
        f"{np.mean(gain):.0f} ± {half_width(gain):.0f}",
        "200, 200, 400",
    ]
    assert paired["Walker2d", "TD3+GILD 10 %"] == ["TD3", "-391", "-391", ""]  # seed 2 with seed 2

    over = {row[0]: row[1:] for row in rows_of(out, "Over Hopper, Walker2d")[1:]}
    expert = np.array([3564, 4683])
    scores = 100 * np.array([[250, 400, 500], [1250, 1400, 1500]]) / expert[:, None]
    low, high = bootstrap(iqm, list(scores))
    assert over["TD3"] == [f"{scores.mean():.1f}", f"{iqm(list(scores)):.1f} [{low:.1f}, {high:.1f}]", ""]

    meta = rows_of(out, "Meta-loss")[1:]
    assert meta == [["Hopper", "TD3+GILD", "600", "500", ""], ["Walker2d", "TD3+GILD", "1600", "1500", ""]]
    times = {row[0]: row[1:] for row in rows_of(out, "Run time")[1:]}
    assert times["TD3+GILD"] == ["33.3", "2.00", "2.07"] and times["TD3+GILD 1 %"] == [
        "16.7",
        "1.00",
        "1.04",
    ]
    assert "intuitive" not in times  # its results have no times
    for name in ("made", "made-scores", "made-warm-start"):
        assert f"(figures/{name}.png)" in out
        assert (study.parent / f"figures/{name}.png").stat().st_size > 10_000
        assert (study.parent / f"figures/{name}.svg").read_text().startswith("<?xml")
    assert "mean over 1 to 3 seeds" in out


def test_warm_start_figure(study, monkeypatch):
    """Figure 5 has the tasks with two shares or more, every seed, and an interval of three seeds or more."""
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda fig, folder, name: drawn.append(fig.axes) or name)
    loaded = sweep.load_study(study)
    runs = report.load(loaded, study.parent)
    del runs["Walker2d"]["td3-gild-10"], runs["Walker2d"]["td3-gild"]
    runs["Hopper"]["td3-gild-10"] = {seed: runs["Hopper"]["td3"][seed] for seed in (1, 2)}
    text = report.warm_start_figure(loaded, runs, study.parent)
    (axis,) = drawn.pop()
    assert axis.get_title() == "Hopper" and "1 to 3 seeds" in text
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "10", "100"]
    means, *seeds = [line.get_ydata().tolist() for line in axis.lines if line.get_marker() in "ox"]
    best = [400 + 100, 700, 900]
    assert np.allclose(means, [np.mean(best), 400, 600])
    assert seeds == [best, [300, 500], [600]]
    (bars,) = axis.collections
    assert np.allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], [2 * half_width(best), 0, 0])

    del runs["Hopper"]
    assert report.warm_start_figure(loaded, runs, study.parent) == ""


def test_means_at_steps(study):
    """A row per task and variant, nan where a seed has no such column or step."""
    at = ["15,000 to 30000", "return at 20,000", "distance at 40,000", "mean of Q at 10,000", "50,000"]
    code, out, _ = run_report(study, "--at", *at)
    assert code == 0
    head, *lines = rows_of(out, "Means over seeds")
    assert head == ["task", "", "seeds", *at]
    means = {(row[0], row[1]): row[2:] for row in lines}
    assert means["Hopper", "TD3"] == ["3", "117", "66.7", "0.1", "nan", "nan"]
    assert means["Walker2d", "TD3"] == ["3", "1117", "1067", "0.1", "nan", "nan"]

    loaded = sweep.load_study(study)
    runs = report.load(loaded, study.parent)
    runs["Hopper"]["td3"][3] = runs["Hopper"]["td3"][3][["global_step", "return_mean"]][:3]
    (row,) = [row for row in report.steps_table(loaded, runs, at).splitlines() if "Hopper | TD3 |" in row]
    assert row == "| Hopper | TD3 | 3 | 117 | 66.7 | nan | nan | nan |"


def test_more_seeds_than_the_studys_count(study):
    write_result(study.parent, "td3-gild", "Hopper-v4", 12, [0, 500, 700, 600], old=False)
    runs = report.load(sweep.load_study(study), study.parent)
    assert list(runs["Hopper"]["td3-gild"]) == [1, 12] and list(runs["Walker2d"]["td3-gild"]) == [1]


def test_another_baseline(study):
    code, out, _ = run_report(study, "--baseline", "td3-gild-1")
    assert code == 0
    paired = {(row[0], row[1]): row[2:] for row in rows_of(out, "Paired differences")[1:]}
    assert paired["Hopper", "TD3"][2] == "-200, -200, -400"
    assert ("Hopper", "TD3+GILD 1 %") not in paired


def test_each_algorithm_is_compared_with_its_own_baseline():
    study = sweep.load_study(ROOT / "benchmark/studies/point2d.toml")
    others = {key: compared_with(study, key, "td3") for key in study.variants}
    assert others["td3-gild"] == others["td3"] == "td3" and others["ddpg-gild"] == others["ddpg"] == "ddpg"
    assert (
        others["diffail"] == others["meta-critic-sac"] == "sac" and others["logo"] == others["ppo"] == "ppo"
    )


def test_many_variants_are_drawn_in_several_panels():
    study = sweep.load_study(ROOT / "benchmark" / "studies" / "point2d.toml")
    keys = [key for key in study.variants if report.algorithm(study, key) == "td3"]
    first, second = report.split(study, keys)
    assert first[0] == second[0] == "td3"
    assert first[1:] + second[1:] == keys[1:]  # the others once each
    assert abs(len(first) - len(second)) <= 1
    assert report.split(study, keys[:6]) == [keys[:6]]
    assert report.split(study, keys[1:3]) == [keys[1:3]]  # its baseline has no run yet
    assert report.split(study, keys[:1]) == [keys[:1]]


def test_the_panels_have_those_variants(tmp_path, monkeypatch):
    """Nine variants of one algorithm: two panels, each with the colors of its own five."""
    study = sweep.load_study(ROOT / "benchmark" / "studies" / "point2d.toml")
    keys = [key for key in study.variants if report.algorithm(study, key) == "td3"]
    table = np.array([(1000, 5.0), (2000, 6.0)], [("global_step", float), ("return_mean", float)])
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda fig, *_: figures.append(fig) or "")
    report.curves(study, {"Point2D": {key: {1: table} for key in keys}}, tmp_path)
    color, groups = report.colors(study), report.split(study, keys)
    for number, (axis, group) in enumerate(zip(figures[0].axes, groups, strict=True), 1):
        assert [line.get_color() for line in axis.lines[: len(group)]] == [color[key] for key in group]
        assert axis.get_title() == f"Point2D, TD3 ({number} of 2)"


def test_three_tasks_have_a_column_each(tmp_path, monkeypatch):
    """With the same variants in a row, though one task has not run them all."""
    study = sweep.load_study(ROOT / "benchmark" / "studies" / "headline.toml")
    table = np.array([(1000, 5.0), (2000, 6.0)], [("global_step", float), ("return_mean", float)])
    runs = {
        task: {key: {1: table} for key in study.variants} for task in ("Hopper", "HalfCheetah", "Walker2d")
    }
    del runs["Walker2d"]["td3-gild-end-frozen"]
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda fig, *_: figures.append(fig) or "")
    report.curves(study, runs, tmp_path)
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles == [f"{task} ({row} of 2)" for row in (1, 2) for task in runs]
    assert [len(axis.get_lines()) for axis in figures[0].axes] == [6, 6, 6, 6, 6, 5]


def test_the_line_of_the_demonstrations():
    level = report.demonstrated_return
    assert level("Point2D", "ppo") == level("Point2D", "sac") != level("Point2D", "td3")
    assert level("Pendulum", "ppo") is None


@pytest.mark.parametrize(("variants", "bands"), [(6, 6), (7, 0)])
def test_a_profile_of_many_variants_has_no_bands(variants, bands, tmp_path, monkeypatch):
    study = sweep.load_study(ROOT / "benchmark" / "studies" / "point2d.toml")
    keys, rows = list(study.variants)[:variants], [("global_step", float), ("return_mean", float)]
    seeds = {seed: np.array([(1000, 5.0 * seed), (2000, 6.0 * seed)], rows) for seed in (1, 2)}
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda fig, *_: figures.append(fig) or "")
    text = report.aggregate_figure(study, {"Point2D": {key: seeds for key in keys}}, tmp_path)
    assert len(figures[0].axes[1].collections) == bands
    assert ("bands" in text) == (bands > 0)


def test_the_caption_of_the_scores_counts_the_seeds_of_the_variants_shown(tmp_path, monkeypatch):
    """Not those of a variant that has not run on every task."""
    study = sweep.load_study(ROOT / "benchmark" / "studies" / "headline.toml")
    rows = [("global_step", float), ("return_mean", float)]
    seeds = {seed: np.array([(1000, 5.0), (2000, 6.0)], rows) for seed in (1, 2, 3)}
    runs = {task: {"td3": seeds, "td3-il": seeds} for task in ("Hopper", "HalfCheetah", "Walker2d")}
    runs["Hopper"]["td3-gild-end-frozen"] = {1: seeds[1]}
    monkeypatch.setattr(report, "save_figure", lambda *_: "")
    assert "HalfCheetah, Walker2d, 3 seeds;" in report.aggregate_figure(study, runs, tmp_path)
    runs["Walker2d"]["td3"] = {1: seeds[1]}
    assert "1 to 3 seeds;" in report.aggregate_figure(study, runs, tmp_path)


def test_one_task_seed_and_variant(tmp_path):
    path = tmp_path / "made.toml"
    path.write_text("seeds = 1\n[tasks]\nPendulum-v1 = 100\n[variants]\na = { run = 'baselines.ppo' }\n")
    sweep.write(tmp_path / "made/a-Pendulum-1.csv", b"global_step,return_mean,return_std\n100,-5,1\n")
    code, out, err = run_report(path)
    assert (code, err) == (0, "")
    assert rows_of(out, "Mean ± std")[1:] == [["Pendulum", "a", "1", "-5.0", "-5.0", "-5.0"]]
    assert "Expert" not in out and "*One seed;" in out


def test_the_committed_results_are_readable(tmp_path):
    """Every study in benchmark/results/ has its TOML, every run its returns and its own arguments."""
    studies = {path.name for path in (ROOT / "benchmark/results").iterdir()}
    assert studies <= {path.stem for path in (ROOT / "benchmark/studies").glob("*.toml")}
    assert {"hopper", "demonstrations"} <= studies
    for path in (ROOT / "benchmark/results").glob("*/*.csv"):
        run = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
        assert np.isfinite(run["return_mean"]).all() and (np.diff(run["global_step"]) > 0).all(), path
    for path in (ROOT / "benchmark/results").glob("*/*.json"):
        assert json.loads(path.read_text())["args"]["seed"] == int(path.stem.split("-")[-1]), path
    code, out, err = call_tool(report, "hopper", "--figures", tmp_path)
    assert (code, err) == (0, "")
    best = {row[1]: row[3] for row in rows_of(out, "Mean ± std")[1:]}
    assert best["TD3+GILD for 10,000 iterations, (B)"].startswith("815") and len(best) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["hoper"], "there is no study"),
        (["hopper", "--baseline", "td4"], "hopper has no variant 'td4', only td3,"),
        (["hopper", "--at", "50,000", "distanse at 20,000"], "'distanse at 20,000' is not like"),
        (["hopper", "--at", "distance"], "'distance' is not like"),
        (
            ["hopper", "--results", "empty"],
            "no results yet: python -m benchmark.sweep hopper\n",
        ),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path):
    code, out, err = call_tool(report, *flags)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# FIGURE 4

FIGURE = """
seeds = 1
flags = "--learning-starts 64 --batch-size 64 --eval-frequency 100 --eval-episodes 1 --buffer-size 1000"
[tasks]
Point2D-v0 = 300
[variants]
ddpg = { run = "baselines.ddpg" }
ddpg-il = { run = "baselines.ddpg_il" }
ddpg-gild = { run = "gild_ddpg --ws-frac 1 --gild-init random" }
sac-il = { run = "baselines.sac_il" }
sac-gild = { run = "gild_sac --ws-frac 1 --gild-init random" }
"""


def test_figure4_from_short_runs(tmp_path):
    study = tmp_path / "tiny.toml"
    study.write_text(FIGURE)
    flags = ["--study", study, "--cells", 3, "--episodes", 1, "--figures", tmp_path]
    code, _, err = call_tool(figure4, *flags)
    assert code == 2 and err.count("\n") == 1
    assert "no finished ddpg, ddpg-il, ddpg-gild, sac-il, sac-gild" in err and f"sweep {study}" in err
    for run in sweep.runs_of(sweep.load_study(study)):
        assert call(import_module(run.script), *run.flags)[0] == 0
    code, _, err = call_tool(figure4, *flags)
    assert code == 0, err
    assert (tmp_path / "figure4.png").stat().st_size > 50_000

    paths = figure4.trajectories(figure4.find_runs(study, 1)["ddpg"][1])
    assert list(paths) == [100, 200, 300] and all((path[0] == 0).all() for path in paths.values())
    assert all(0.01 < np.abs(np.diff(path, axis=0)).max() <= 0.1 + 1e-9 for path in paths.values())


def test_principal_plane():
    """The two directions in which the points lie farthest from the last one."""
    points = np.random.default_rng(0).normal(size=(20, 6)) * (5, 4, 3, 2, 1, 1) + np.arange(20)[:, None] / 4
    origin, directions = figure4.principal_plane(points)
    differences = points - points[-1]
    _, vectors = np.linalg.eigh(differences.T @ differences)
    assert (origin == points[-1]).all()
    assert np.allclose(np.abs(directions @ vectors), np.eye(6)[[5, 4]], atol=1e-6)


def test_surface_is_that_of_the_plane(tmp_path, monkeypatch):
    """With the coordinates of a policy in the plane for its return."""
    script = import_module("baselines.ddpg")
    flags = "--env-id Point2D-v0 --total-timesteps 260 --learning-starts 64 --batch-size 64 --no-cuda"
    flags += " --eval-frequency 50 --eval-episodes 1 --buffer-size 1000 --keep-policies"
    assert call(script, *flags.split())[0] == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    points = [
        torch.cat([w.flatten() for w in weights.values()]) for weights in figure4.policies(run_dir).values()
    ]
    origin, directions = figure4.principal_plane(torch.stack(points).double().numpy())

    def rollout(actor, *more, **settings):
        point = torch.cat([weight.detach().flatten() for weight in actor.parameters()]).double().numpy()
        while True:
            yield {"rewards": directions @ (point - origin) * (1, 100)}

    monkeypatch.setattr(figure4, "rollout", rollout)
    x, y, returns, path = figure4.surface(run_dir, 4, 2, figure4.tqdm(disable=True))
    assert np.allclose(returns, x[None] + 100 * y[:, None], atol=1e-4)
    assert np.allclose(path, [directions @ (point.double().numpy() - origin) for point in points])
    assert len(path) == 6 and np.allclose(path[-1], 0)
    assert (x[0] < path[:, 0]).all() and (path[:, 0] < x[-1]).all() and (y[0] < path[:, 1]).all()


def test_kl_divergence_against_samples():
    """E [log pi(a|s) - log b(a|s)], a ~ pi, with SAC's own squashed densities."""
    torch.manual_seed(0)
    actor, behavior, obs = sac.Actor(2, 2), sac.Actor(2, 2), torch.randn(5, 2)
    with torch.no_grad():
        for parameter in behavior.parameters():
            parameter *= 1.3  # another width, so that the divergence has a direction
        mean, log_std = actor.gaussian(obs)
        u = mean + log_std.exp() * torch.randn(40_000, 5, 2)
        logs = [policy.log_density(u, *policy.gaussian(obs)) for policy in (actor, behavior)]
    expected = (logs[0] - logs[1]).mean()
    assert abs(figure4.kl_divergence(actor, behavior, obs) / expected - 1) < 0.02
    assert abs(figure4.kl_divergence(behavior, actor, obs) / expected - 1) > 0.2
    assert figure4.kl_divergence(actor, actor, obs) == 0


def test_behavior_trajectories_are_the_demonstrated_episodes():
    with np.load(ROOT / "demos/Point2D-ddpg.npz") as file:
        observations, metadata = file["observations"], json.loads(str(file["metadata"]))
    episodes = figure4.behavior_trajectories("ddpg", count=10**6)
    assert len([episode for episode in episodes if len(episode)]) == metadata["episodes"]
    assert all((episode[0] == 0).all() for episode in episodes if len(episode))
    assert (np.concatenate(episodes) == observations).all()


def test_smoothing():
    assert figure4.smooth(np.array([0.0, 3, 6, 3, 0]), 3).tolist() == [1.5, 3, 4, 3, 1.5]
    assert figure4.smooth(np.ones(3), 5).tolist() == [1, 1, 1]


def test_a_ratio_of_times_is_over_the_tasks_that_both_have(study):
    """GILD takes twice as long on Hopper, 20 times on Walker2d, where TD3 has no result."""
    for seed in (1, 2, 3):
        sweep.result(study.parent, "made", "td3", "Walker2d-v4", seed).unlink()
    path = sweep.result(study.parent, "made", "td3-gild", "Walker2d-v4", 1)
    head, *lines = [line.rsplit(",", 1) for line in path.read_text().splitlines()]
    path.write_text("\n".join([",".join(head), *(f"{row},{10 * float(time)}" for row, time in lines)]))
    made = sweep.load_study(study)
    table = report.time_table(made, report.load(made, study.parent))
    (row,) = [line for line in table.splitlines() if line.startswith("| TD3+GILD |")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["183", "2.00"]


def test_times_have_no_ratio_without_the_vanilla_algorithm(study):
    for task in ("Hopper-v4", "Walker2d-v4"):
        for seed in (1, 2, 3):
            sweep.result(study.parent, "made", "td3", task, seed).unlink()
    made = sweep.load_study(study)
    lines = report.time_table(made, report.load(made, study.parent)).splitlines()[2:]
    assert len(lines) > 1 and {line.split("|")[3].strip() for line in lines} == {""}
