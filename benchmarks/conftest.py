"""Options and device of a benchmark run; the device is printed before anything else."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from benchmarks import machine, report


@dataclass(frozen=True)
class Settings:
    """How this run measures: on what, in which dtype, and whether only to see that everything runs."""

    device: torch.device
    dtype: torch.dtype
    smoke: bool
    machine: dict[str, str | int]
    results: list[dict] = field(default_factory=list)


SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("txl_kernels")
    group.addoption("--smoke", action="store_true", help="every benchmark once, in tiny size (or TXL_BENCH_SMOKE=1)")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    group.addoption("--threads", type=int, help="CPU threads for both sides; default: torch's own choice")


def pytest_configure(config: pytest.Config) -> None:
    try:
        device = machine.choose_device(config.getoption("device"))
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    if config.getoption("threads") is not None:
        torch.set_num_threads(config.getoption("threads"))
    config.stash[SETTINGS] = Settings(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        smoke=config.getoption("smoke") or os.environ.get("TXL_BENCH_SMOKE") == "1",
        machine=machine.describe(device),
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Prints the device, with -q too, which would drop a pytest_report_header."""
    settings = session.config.stash[SETTINGS]
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    smoke = " (smoke run: tiny sizes, times mean nothing)" if settings.smoke else ""
    terminal.write_line(f"device: {machine.headline(settings.machine)}{smoke}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The comparison, which pytest-benchmark's own table does not show."""
    settings = config.stash[SETTINGS]
    if settings.results and not settings.smoke:
        terminalreporter.write_line(f"\n{report.markdown(settings.results)}")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.stash[SETTINGS]


@pytest.fixture
def record(benchmark, settings: Settings) -> Callable[[dict], None]:
    """Stores what a benchmark found, for the saved JSON and for the summary of this run."""

    def store(found: dict) -> None:
        benchmark.extra_info |= found | {"smoke": settings.smoke, "machine": settings.machine}
        settings.results.append(benchmark.extra_info)

    return store
