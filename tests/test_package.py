"""The wheel: what is in it, and that it works installed into an empty environment."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that no earlier build leaks in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("txl_kernels", "reference", "tests", "benchmarks"):
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".typed"):
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*build, "--wheel-dir", target, source)
    (built,) = target.glob("*.whl")
    return built


def test_only_the_package_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"txl_kernels"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "txl_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert "txl_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_in_an_empty_environment(wheel, tmp_path):
    """Of this environment only torch and what it needs are lent, behind the empty one's own packages."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel)
    (packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"])
    program = (
        "import torch, txl_kernels\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "print(txl_kernels.__file__, txl_kernels.__version__, txl_kernels.rel_attention(x, x, x, x[0]).shape)\n"
    )
    without_compiler = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    found = run(environment / "bin" / "python", "-c", program, cwd=tmp_path, env=without_compiler)
    assert found.startswith(str(packages))


def test_every_mutation_finds_its_line():
    """The lists of tests/mutations.py follow the code."""
    for name, mutation in MUTATIONS.items():
        assert mutation.old in (ROOT / mutation.file).read_text(), name
        assert mutation.old != mutation.new, name
        assert (ROOT / mutation.tests).exists(), name
