"""Which device is measured, and how results name it."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

GPU_FILES = ("/dev/nvidia0", "/dev/kfd")  # NVIDIA's first GPU, AMD's compute driver


def choose_device(requested: str | None = None) -> torch.device:
    """The GPU if torch sees one, else the CPU.

    Args:
        requested: "cpu" or "cuda" to measure that one instead.

    Raises:
        RuntimeError: this machine has a GPU that torch does not see; a CPU run would pass for its result.
    """
    if requested is not None:
        return torch.device(requested)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if evidence := gpu_evidence():
        raise RuntimeError(
            f"this machine has a GPU ({evidence}) but torch {torch.__version__} does not see it; "
            "install a torch built for it, or ask for --device cpu"
        )
    return torch.device("cpu")


def gpu_evidence() -> str | None:
    """What shows that a GPU is present, asked without torch; None if nothing does."""
    for path in GPU_FILES:
        if Path(path).exists():
            return path
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    return next((line for line in listed.stdout.splitlines() if line.startswith("GPU ")), None)


def describe(device: torch.device) -> dict[str, str | int]:
    """What a result was measured on: device, threads, versions, commit."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _cpu_name(),
        "kind": "gpu" if is_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def headline(machine: dict[str, str | int]) -> str:
    """The line that every run and every table starts with."""
    where = f"{machine['device']}" + (f", {machine['threads']} threads" if machine["kind"] == "cpu" else "")
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "python"))
    return f"{where}; {versions}; commit {machine['commit']}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            " + changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
