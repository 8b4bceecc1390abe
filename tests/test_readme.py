"""The READMEs: the worked example runs, the flags exist, the tables are those of the committed results."""

import ast
import re

import pytest

import gild_td3
from benchmark import report, sweep
from tests.conftest import ROOT, call

README, DEMOS, BENCHMARK = (
    (ROOT / folder / "README.md").read_text("utf-8") for folder in (".", "demos", "benchmark")
)


def test_the_worked_example():
    (example,) = re.findall(r"```python\n(.*?)```", DEMOS, re.DOTALL)
    (path,) = re.findall(r'save_demonstrations\("(.*?)"', example)
    (command,) = re.findall(rf"^python gild_td3.py (.*{path}.*)$", DEMOS, re.MULTILINE)
    exec(example, {})
    # the same command, only shorter, with larger steps: 300 iterations suffice to reach the hilltop
    shorter = "--learning-starts 500 --total-timesteps 800 --learning-rate 1e-3 --batch-size 64 --no-cuda"
    shorter += " --eval-frequency 400 --eval-episodes 1"
    code, out, err = call(gild_td3, *command.split(), *shorter.split())
    assert (code, err) == (0, "")
    before, after = (float(line.split()[3]) for line in out.splitlines()[1:])
    assert before <= 0 < 50 < after


def flags_of(path):
    """The flags that a script's Args has, and `--no-` for those that are on or off."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if getattr(node, "name", "") == "Args":
            for field in (field for field in node.body if isinstance(field, ast.AnnAssign)):
                flag = field.target.id.replace("_", "-")
                yield f"--{flag}"
                if ast.unparse(field.annotation).startswith("bool"):
                    yield f"--no-{flag}"


def test_the_flags_that_the_readmes_name_exist():
    folders = ".", "baselines", "benchmark", "demos", "tests"
    flags = {flag for folder in folders for path in (ROOT / folder).glob("*.py") for flag in flags_of(path)}
    assert {"--ws-frac", "--resume", "--kills", "--no-cuda"} <= flags
    flags |= {"--help", "--logdir", "--head"}  # tyro's, TensorBoard's and Ray's
    for text in (README, DEMOS, BENCHMARK):
        assert set(re.findall(r"(?<![-\w])--[a-z][a-z0-9-]+", text)) <= flags


def rows(table):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]


def table_with(text, cells):
    """The one table in a text that has these cells in a row."""
    (table,) = [t for t in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if " | ".join(cells) in t]
    return rows(table)


@pytest.mark.parametrize(
    ("name", "text"), [("headline", README), ("headline-185k", BENCHMARK), ("million", BENCHMARK)]
)
def test_the_score_tables_are_the_committed_results(name, text):
    """Row by row as benchmark.report has them, under headings and names of their own."""
    study = sweep.load_study(ROOT / f"benchmark/studies/{name}.toml")
    runs = report.load(study, sweep.RESULTS)
    number = len(study.scores)
    scores = [row[3 : 3 + number] for row in rows(report.score_table(study, runs))[2:]]
    assert [row[-1 - number : -1] for row in table_with(text, scores[0])[2:]] == scores


def test_the_table_by_steps_is_the_committed_results():
    """Headline's table of `benchmark.report --at`, whose heading has what stands after --at."""
    study = sweep.load_study(ROOT / "benchmark/studies/headline.toml")
    head, _, *lines = table_with(BENCHMARK, ["distance at 20,000", "distance at 50,000"])
    expected = rows(report.steps_table(study, report.load(study, sweep.RESULTS), head[2:]))[2:]
    assert [row[2:] for row in lines] == [row[3:] for row in expected]
