"""kill -9 before every rename, link, fsync and mkdir; then the same command ends with the same bytes, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_side_by_side import COMMANDS, words

from forks import KILLED, at_the_point, contents, die, empty, fork
from test_cli import TRAINING, succeeds
from whence.storage import leftovers, processes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("what", COMMANDS)
def test_killed_at_every_point(small, tmp_path, what):
    folder, points = tmp_path / "run", tmp_path / "points"
    call = words(small, what, folder)
    assert fork(call, tmp_path / "log", at_the_point(-1, die, points)).code == 0
    whole, count = contents(folder), len(points.read_text().splitlines())
    assert count > 4
    # All of them take a quarter of an hour: WHENCE_CAMPAIGN=1 tries each, otherwise two or three do, others every day.
    every = 1 if os.environ.get("WHENCE_CAMPAIGN") else max(1, count // 2)
    for point in range(time.localtime().tm_yday % every, count, every):
        empty(folder)
        assert fork(call, tmp_path / "log", at_the_point(point, die)).code == KILLED
        left = list(folder.rglob("*.tmp"))
        done = fork(call, tmp_path / "log")
        where = points.read_text().splitlines()[point]
        assert done.code == 0, (where, done.told)
        assert contents(folder) == whole, (where, left)
        assert not list(folder.rglob("*.tmp")), where


def test_killed_again_and_again(small, tmp_path):
    """Each time a little later: what is finished stays finished."""
    folder = tmp_path / "model"
    call = words(small, "train", folder)
    succeeds(*call)
    whole = contents(folder)
    empty(folder)
    for point in range(2, 12, 3):
        assert fork(call, tmp_path / "log", at_the_point(point, die)).code in (0, KILLED)
    succeeds(*call)
    assert contents(folder) == whole


# ------------------------------------------------------------------------------------------------------ what is left


def dead() -> int:
    """The number of a process that is gone."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


HOST = processes.HOST
LEFT = {  # name, age in hours, whether it goes; PID is that of a process that is gone
    "its process is gone": (f"report.html.{HOST}-PID-0.tmp", 0, True),
    "a folder of a process that is gone": (f".generated.{HOST}-PID-3.tmp/", 0, True),
    "of an earlier version": ("report.html.PID.tmp", 0, True),
    "a folder of an earlier version": (".checkpoint-4.PID.tmp/", 0, True),
    "deep inside": (f"features/abc/part-00000.safetensors.{HOST}-PID-1.tmp", 0, True),
    "of a unit": (f"units/.00003.{HOST}-PID-1.tmp/", 0, True),
    "our own number, in an earlier life of a container": (f"x.json.{HOST}-{os.getpid()}-999999.tmp", 0, True),
    "another machine": ("report.html.0123abcd-PID-0.tmp", 0, False),
    "another machine, long ago": ("report.html.0123abcd-PID-0.tmp", 48, True),
    "its process runs": (f"report.html.{HOST}-{os.getppid()}-0.tmp", 0, False),
    "somebody else's": ("backup.2024.tmp", 48, False),
    "somebody else's, with a number": ("notes.PID.tmp", 48, False),
    "a plain name": ("x.tmp", 48, False),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_killed_processes_left(tmp_path, name):
    pattern, age, goes = LEFT[name]
    path = tmp_path / pattern.replace("PID", str(dead())).rstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    if pattern.endswith("/"):
        path.mkdir()
        (path / "half").write_text("x")
    else:
        path.write_text("x")
    then = time.time() - age * 3600
    os.utime(path, (then, then))
    leftovers.sweep(tmp_path)
    assert path.exists() is not goes


def test_what_is_being_written_stays(tmp_path):
    path = processes.name_of(tmp_path / "x.json")
    with leftovers.in_use(path):
        path.write_text("half")
        leftovers.sweep(tmp_path)
        assert path.exists()
    leftovers.sweep(tmp_path)
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------------ signals


def stopped(call: tuple[object, ...], number: int, after: float) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "whence.cli.main", *map(str, call)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Also where the tests themselves run in the background, whose Ctrl-C is ignored, by their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # Before, not a line of ours has run.
    until = time.monotonic() + 60
    while time.monotonic() < until and not listens(process.pid):
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(number)
    try:
        return process.wait(120), process.communicate()[1]
    finally:
        process.kill()


def listens(pid: int) -> bool:
    """Python itself leaves SIGTERM alone: whoever catches it is whence."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "after"),
    [
        *((signal.SIGINT, 0.0), (signal.SIGINT, 0.7), (signal.SIGINT, 4.0)),
        *((signal.SIGTERM, 0.3), (signal.SIGTERM, 2.0)),
    ],
)
def test_ctrl_c_at_any_moment(small, tmp_path, number, after):
    """In the middle of imports as well as of the work: one line, exit code 130; the same command again goes on. Both signals
    have one handler, so that each is sent at moments of its own."""
    long = ("train", "new", "--train_data_dir", small.images, "--output_dir", tmp_path, *TRAINING[:-6])
    code, told = stopped((*long, "--max_train_steps", 100_000), number, after)
    assert code == 130, told
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("whence: stopped; what is finished is kept")


def test_ctrl_c_is_ignored_where_the_shell_says_so(small, tmp_path):
    """`nohup`, and what scripts start in the background."""
    script = (
        f"trap '' INT; {sys.executable} -m whence.cli.main methods >/dev/null & p=$!; sleep 0.4; kill -INT $p; wait $p"
    )
    shell = shutil.which("bash") or "sh"
    done = subprocess.run([shell, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0
