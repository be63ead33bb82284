"""What is published: a wheel and a source archive, built here, installed where nothing of this checkout is, and used there.

Without a network: an environment of its own sees the libraries that lie here and not the checkout (lines of a .pth file are
no places where others are looked for), and gets the wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import whence

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_BUILT = (".git", ".venv", "runs", "demo", "build", "scratch")


def run(*words: object, where: Path, **more: str) -> str:
    """A command that succeeds, in a folder of its own; its output."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    settings = kept | {"OMP_NUM_THREADS": "1", "WHENCE_QUIET": "1", "HF_HUB_OFFLINE": "1"} | more
    done = subprocess.run(
        [str(word) for word in words], cwd=where, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from a copy: building leaves things behind."""
    folder = tmp_path_factory.mktemp("package")
    copy, out = folder / "copy", folder / "dist"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name not in NOT_BUILT and not path.name.endswith((".egg-info", "_cache")):
            (copy / path.name).symlink_to(path)
    # Of these setuptools writes beside the sources.
    (copy / "src").unlink()
    run("cp", "-r", ROOT / "src", copy / "src", where=folder)
    run("find", copy / "src", "-name", "*.egg-info", "-exec", "rm", "-r", "{}", "+", where=folder)
    for kind in ("wheel", "sdist"):
        run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})", where=copy)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin/ of an environment with the wheel."""
    root = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", root, where=root.parent)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    run(root / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, where=root.parent)
    return root / "bin"


def test_the_name_is_ours_and_the_import_is_whence(wheel, installed, tmp_path):
    assert wheel.name == f"whence_attribution-{whence.__version__}-py3-none-any.whl"
    code = "import whence, whence.types as t; print(whence.__file__, whence.__version__, t.VERSION)"
    place, *versions = run(installed / "python", "-c", code, where=tmp_path).split()
    assert Path(place).is_relative_to(installed.parent)
    assert versions == [whence.__version__] * 2
    assert run(installed / "whence", "--version", where=tmp_path) == f"whence {whence.__version__}\n"


def test_the_wheel_holds_all_that_is_no_code(wheel):
    """Every file of the source tree but what Python and setuptools leave: templates, shipped banks, the mark of types."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("whence/")}
    source = ROOT / "src"
    there = {str(path.relative_to(source)) for path in (source / "whence").rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    assert names == there
    assert {"whence/py.typed", "whence/report/templates/report.html"} <= names
    assert any(name.startswith("whence/evaluation/shipped/digits/") for name in names)


def test_it_works_where_nothing_of_the_checkout_is(installed, tmp_path):
    """A training, a run with its page, the shipped bank."""
    code = (
        "import torch; from whence.data.saving import save_png\n"
        "x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1\n"
        "save_png('images', x[:10], [f'{i}' for i in range(10)], [{'creator': 'ab'[i % 2]} for i in range(10)])\n"
        "save_png('queries', x[10:], ['first', 'second'])\n"
        "from whence.evaluation import banks\n"
        "bank = banks.load('digits', banks.digits())\n"
        "import sys; from whence.cli.main import main\n"  # one process, as each spends seconds on what it imports
        "for line in open('commands'):\n"
        "    sys.argv = ['whence', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, line\n"
    )
    small = "--block_out_channels 16,16 --max_train_steps 4 --lr_warmup_steps 1 --train_batch_size 4"
    commands = (
        f"train new --train_data_dir images --output_dir ddpm {small}",
        "attribute ddpm --train_data_dir images --query_data_dir queries --draws 2 --dim 16 --output_dir run",
        "credit run",
        "clean images --output_dir clean",
    )
    (tmp_path / "commands").write_text("\n".join(commands))
    run(installed / "python", "-c", code, where=tmp_path)
    for page in ("run/report.html", "run/credit/creator/credit.html", "clean/clean.html"):
        assert "</html>" in (tmp_path / page).read_text()


def test_the_tests_run_from_the_source_archive(built, installed, tmp_path):
    """With what they are made of: conftest, families, worlds, pages and figures."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    for name in ("tests/conftest.py", "tests/families.py", "tests/worlds.py", "docs/methods.md", "benchmarks/_record.py",
                 "benchmarks/results/digits_seeds.json", "Makefile", "constraints.txt", "README.md", "LICENSE"):  # fmt: skip
        assert (root / name).is_file(), name
    some = ("tests/test_outputs.py",)
    told = run(installed / "python", "-m", "pytest", "-q", "-m", "not slow", *some, where=root)
    assert re.search(r"\d+ passed", told) or "[100%]" in told


def test_extras_are_complete():
    """[all] names every other extra that a user may want."""
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", everything)[1].split(","))
    assert set(extras) - {"all", "dev", "docs"} <= named


def test_versions_of_python_are_those_that_the_classifiers_name():
    """And the source can be read by each that is here."""
    named = [each.rsplit(" ")[-1] for each in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", each)]
    assert named[0] == PROJECT["requires-python"].removeprefix(">=")
    for version in named:
        places = [Path.home() / ".pyenv" / "versions", Path("/usr/bin"), Path("/usr/local/bin")]
        found = [path for place in places for path in place.glob(f"{version}.*/bin/python3")]
        found += [path for place in places[1:] for path in place.glob(f"python{version}")]
        for python in found[:1]:
            code = (
                "import ast, pathlib, sys; [ast.parse(p.read_bytes()) for p in pathlib.Path(sys.argv[1]).rglob('*.py')]"
            )
            run(python, "-W", "error", "-c", code, ROOT / "src", where=ROOT)
