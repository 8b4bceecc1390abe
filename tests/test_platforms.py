"""Other systems, `python -O`, and a notebook that calls `train` itself."""

import os
import signal
import subprocess
import sys

import torch

from tests.conftest import ROOT, same

FLAGS = """--env-id Point2D-v0 --total-timesteps 60 --learning-starts 32 --batch-size 32 --eval-frequency 30
--eval-episodes 1 --buffer-size 50 --ws-frac 0.2 --gild-init random --no-cuda"""

# what Python has on POSIX systems only, taken away before anything else is imported
POSIX = """
import os, runpy, signal, sys

for name in "resource fcntl termios tty pty pwd grp syslog".split():
    sys.modules[name] = None
names = "sysconf sysconf_names fork forkpty sched_getaffinity sched_setaffinity getuid geteuid getgid getegid"
names += " getgroups getloadavg getpgid killpg setsid nice wait wait3 wait4 chown fchown chroot mkfifo"
names += " pread pwrite statvfs fstatvfs posix_fallocate posix_fadvise sync fdatasync O_DIRECTORY O_CLOEXEC"
for name in names.split():
    delattr(os, name)
names = "SIGKILL SIGHUP SIGQUIT SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGSTOP SIGXFSZ alarm pause setitimer"
for name in names.split() + ["sigwait", "pthread_sigmask", "pthread_kill"]:
    delattr(signal, name)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluations(tmp_path):
    (path,) = tmp_path.glob("runs/*/evaluations.csv")
    return path.read_text()


def test_a_run_without_what_only_posix_has(tmp_path):
    """On a console, moreover, that has no ±."""
    out = run("-c", POSIX, ROOT / "gild_td3.py", *FLAGS.split(), PYTHONIOENCODING="ascii")
    assert "0.0 ? 0.0" in out
    assert evaluations(tmp_path).count("\n") == 1 + 2


def test_a_run_with_assertions_off(tmp_path):
    run("-O", ROOT / "gild_td3.py", *FLAGS.split())
    assert evaluations(tmp_path).count("\n") == 1 + 2


def test_training_in_a_notebook_repeats_and_leaves_its_settings_alone(monkeypatch):
    from gild_td3 import Args, train

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert not torch.are_deterministic_algorithms_enabled()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    args = Args(env_id="Point2D-v0", total_timesteps=60, learning_starts=32, batch_size=32, eval_episodes=1)
    args.buffer_size, args.ws_frac, args.gild_init, args.cuda, args.torch_threads = (
        50,
        0.2,
        "random",
        False,
        2,
    )
    first, second = (torch.load(train(args) / "policy.pt", weights_only=True)["actor"] for _ in range(2))
    assert same(first, second)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
