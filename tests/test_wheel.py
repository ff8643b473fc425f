"""`pip install .`: the bundle as an installed package, with a command and types."""
from __future__ import annotations

import email
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

import orchestrator
from conftest import REPOSITORY, clean_environment
from postgres import eventually
from tools import bundle

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make build` makes of this source, without the network."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "tools" / "package", source / "tools" / "package")
    (source / "dist").mkdir()
    (source / "dist" / "orchestrator.py").write_text(bundle.bundle())
    subprocess.run([*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", built, source], check=True,
                   env=clean_environment())
    [path] = built.iterdir()
    return path


@pytest.fixture(scope="module")
def bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment where the wheel is installed; its dependencies are those that run the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, env=clean_environment())
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return folder / "bin"


@pytest.fixture
def run(bin: Path, folder: Path) -> Callable[..., str]:
    """Run an installed program to its end, in an empty folder; returns what it printed."""

    def run(program: str, *args: str, **settings: str) -> str:
        done = subprocess.run([bin / program, *args], cwd=folder, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              env=clean_environment(**settings), timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def worker(bin: Path, folder: Path, db: str) -> Iterator[Callable[[], str]]:
    """Start the installed command as a worker; returns its address."""
    started: list[subprocess.Popen[str]] = []

    def start() -> str:
        started.append(subprocess.Popen([bin / "orchestrator"], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=clean_environment(DATABASE_URL=db, METRICS_PORT=0)))
        for line in started[0].stdout or ():
            if "http://" in line:
                return line.split("http://")[1].split("/")[0]
        raise AssertionError("it ended without saying its address")

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_wheel_holds_the_bundle_the_types_marker_and_nothing_of_the_repository(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {"orchestrator/__init__.py", "orchestrator/__main__.py", "orchestrator/py.typed"}
        assert archive.read("orchestrator/__init__.py").decode() == bundle.bundle()


def test_wheel_names_its_version_and_its_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == orchestrator.VERSION

    def parts(requirement: str) -> frozenset[str]:   # their order is the build backend's
        return frozenset(re.split(",|(?=[<>])", requirement))

    assert set(map(parts, metadata.get_all("Requires-Dist"))) == set(map(parts, PROJECT["dependencies"]))


def test_installed_command_and_module_say_the_version(run):
    assert orchestrator.VERSION in run("orchestrator", "--version")
    assert run("python", "-m", "orchestrator", "--version") == run("orchestrator", "--version")
    assert run("python", "-c", "import orchestrator; print(orchestrator.VERSION)") == orchestrator.VERSION + "\n"


def test_installed_command_installs_enqueues_and_runs_a_handler(run, worker, db, folder):
    (folder / "handlers.py").write_text(
        "import orchestrator\n"
        "def hello(task):\n"
        "    return {'hello': task.payload['name'], 'from': orchestrator.__file__}\n"
        "HANDLERS = {'task:hello': hello}\n")
    run("orchestrator", "install", DATABASE_URL=db)
    run("orchestrator", "enqueue", "task:hello", '{"name": "Ada"}', DATABASE_URL=db)
    address = worker()
    with psycopg.connect(db, autocommit=True) as conn:
        ended = "select result from orchestrator.tasks where status = 'completed'"
        [result] = eventually(lambda: conn.execute(ended).fetchone())
    assert result["hello"] == "Ada"
    assert result["from"].endswith("/site-packages/orchestrator/__init__.py")
    with urllib.request.urlopen(f"http://{address}/", timeout=10) as answer:
        assert answer.read().decode() == (REPOSITORY / "page.html").read_text()


@pytest.mark.timeout(180)   # mypy reads the whole module
def test_a_type_checker_sees_the_types(run, folder):
    (folder / "program.py").write_text("import orchestrator\nreveal_type(orchestrator.Orchestrator().enqueue('t'))\n")
    shown = run("python", "-m", "mypy", "--cache-dir", str(folder / "cache"), "--strict", "program.py")
    assert 'Revealed type is "' in shown
    assert "Any" not in shown
