"""The worked example runs as it stands, and the flags that the READMEs name exist."""

import ast
import re

import gild_td3
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
