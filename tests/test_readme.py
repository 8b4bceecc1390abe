"""The README's worked example runs as it stands, and the flags that the README names exist."""

import os
import re
import subprocess
import sys
from importlib import import_module

from tests.conftest import ALGORITHMS, ROOT

README = (ROOT / "README.md").read_text()


def test_the_worked_example(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"^python (gild_td3.py .*mountain_car.npz.*)$", README, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, check=True)
    script, *flags = command.split()
    # the same command, only shorter: 5,000 random steps and 800 iterations suffice to reach the hilltop
    shorter = "--learning-starts 5000 --total-timesteps 5800 --eval-frequency 200 --eval-episodes 3 --no-cuda"
    flags += shorter.split()
    run = subprocess.run(
        [sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    returns = [float(line.split()[3]) for line in run.stdout.splitlines()[1:]]
    assert max(returns[:25]) < 0 < 90 < max(returns[25:])  # without and with the objective


def test_the_flags_that_the_readme_names():
    scripts = [import_module(f"gild_{algorithm}") for algorithm in ALGORITHMS]
    flags = {f"--{name.replace('_', '-')}" for script in scripts for name in vars(script.Args())}
    flags |= {"--help", "--policy", "--out", "--logdir", "--kills", "--render", "--video"}
    flags |= {"--algo", "--to-minari", "--rounds", "--steps", "--no-learners", "--no-runs"}
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", README)) <= flags
