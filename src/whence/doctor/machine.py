"""Whether this machine has what a run needs: disk, memory, device; and whether the output folder is free for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from whence.data.layout import Finding
from whence.doctor.findings import NOTHING, Findings, in_bytes
from whence.doctor.inputs import Inputs
from whence.types import Engine

LITTLE = 2**30  # free bytes of disk or memory below which a run is likely to stop


def standing(path: Path) -> Path:
    """The nearest folder that is there: where the output will be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk(output: Path) -> Findings:
    at = standing(output)
    if not at.is_dir():
        return [Finding("error", f"{at} is a file", str(output), "give another output folder")]
    if not os.access(at, os.W_OK | os.X_OK):
        return [Finding("error", f"{at} cannot be written to", str(output), "make it writable, or give another folder")]
    free = shutil.disk_usage(at).free
    if free < LITTLE:
        fix = "free some space, or give a folder on another disk"
        return [Finding("warning", f"only {in_bytes(free)} are free on this disk", str(output), fix)]
    return [Finding("note", f"{in_bytes(free)} are free on this disk", str(output), NOTHING)]


def earlier_run(inputs: Inputs) -> Findings:
    """Whether the output folder goes on with an earlier run, which was of the same model and images, or it is refused."""
    if not (inputs.output / "index.json").exists():
        return []
    return [Finding("note", "a run of this model and these images; it is gone on with", str(inputs.output), NOTHING)]


def memory() -> Findings:
    total, free = machine_memory()
    if not total:
        return [Finding("note", "the size of this machine's memory is unknown", "memory", NOTHING)]
    what = f"{in_bytes(free)} of {in_bytes(total)} are available"
    if free < LITTLE:
        return [Finding("warning", what, "memory", "close other programs")]
    return [Finding("note", what, "memory", NOTHING)]


def machine_memory() -> tuple[int, int]:
    """Bytes in all and available, inside a container those of the container; 0 where the system does not say."""
    total, free = in_kernel("/proc/meminfo", "MemTotal"), in_kernel("/proc/meminfo", "MemAvailable")
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in groups:
        try:
            allowed, taken = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        if allowed < total:
            total, free = allowed, max(0, min(free, allowed - taken))
    return total, free


def in_kernel(path: str, field: str) -> int:
    """A size in a table of the Linux kernel, in bytes; 0 elsewhere."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def device() -> Findings:
    findings, where = [], "device"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        what = f"{torch.cuda.get_device_name(number)}, {in_bytes(free)} of {in_bytes(total)} free"
        findings.append(Finding("note", what, f"device cuda:{number}", f"give --device cuda:{number} to use it"))
    if not findings and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        what = f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it"
        findings.append(Finding("warning", what, where, "install a CUDA build of torch that fits its driver"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    what = f"{'' if findings else 'no CUDA GPU; '}CPU with {cores} cores, {threads} of them used"
    what += f" (OMP_NUM_THREADS={asked})" if asked else ""
    if threads > cores:
        findings.append(Finding("warning", what, where, f"set OMP_NUM_THREADS={cores}: more threads are slower"))
    else:
        fix = f"set OMP_NUM_THREADS={cores} to use all" if threads < cores else NOTHING
        findings.append(Finding("note", what, where, fix))
    return findings


def forget_peak(engine: Engine) -> None:
    """From now on `peak` counts anew.

    Args:
        engine: says the device.
    """
    if torch.device(engine.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from now on


def peak(engine: Engine) -> tuple[int, int]:
    """Most bytes held since `forget_peak`, by the program and on the GPU; the argument as of `forget_peak`."""
    cuda = torch.device(engine.device).type == "cuda"
    return in_kernel("/proc/self/status", "VmHWM"), torch.cuda.max_memory_allocated(engine.device) if cuda else 0
