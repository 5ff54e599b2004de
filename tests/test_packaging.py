"""What is installed: a wheel that works in a clean environment, beside packages that own our generic names."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built from the checkout; without the CUDA kernels, which take longest and are like the others here."""
    return built(tmp_path_factory.mktemp("wheel"), "-C", "cmake.define.MERGEKIT_PLUS_CUDA=OFF")


def built(out: Path, *options: str, **environment: str) -> Path:
    """A wheel of the checkout, as its files stand."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), *options, str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True, timeout=280, env=os.environ | environment)
    return next(out.glob("mergekit_plus-*.whl"))


def environment(folder: Path, *wheels: Path) -> Path:
    """A new environment with these wheels that borrows this one's dependencies; returns its python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", *map(str, wheels)]
    subprocess.run(install, check=True, capture_output=True, timeout=200)
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    # appended behind the environment's own packages; our own editable install in there is shadowed by the wheel
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def test_the_wheel_holds_cli_inside_the_package_and_none_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "mergekit_plus/cli.py" in names
    assert "cli.py" not in names
    assert {name.split("/")[0] for name in names if not name.startswith("mergekit_plus-")} == {"mergekit_plus", "quant", "prune"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_the_kernels_and_runs_on_every_python_3(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "quant/kernels/lib/libmergekit_plus_cpu.so" in zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_pure_python_and_says_what_it_lacks(tmp_path: Path) -> None:
    wheel = built(tmp_path, "-C", f"build-dir={tmp_path / 'build'}", CXX="/nonexistent/c++")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "mergekit_plus/cli.py" in names
    assert not [name for name in names if name.endswith(".so")]
    python = environment(tmp_path / "venv", wheel)
    product = "k.packed_linear(torch.ones(8), torch.tensor([[-1]], dtype=torch.int32), torch.ones(1, 1), None, 4, 8)"
    code = f"import torch, quant.kernels as k; print(k.available()['cpu'], {product})"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout == "False tensor([56.])\n"  # eight times 7
    assert run.stderr.count("no CPU kernels: libmergekit_plus_cpu.so was not built; it needs a C++ compiler when mergekit-plus is installed") == 1


def test_the_source_distribution_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, timeout=100)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", "csrc/cpu/avx512.h", "csrc/include/mergekit_plus_kernels.h", "cli.py", "tests/test_packaging.py", "constraints.txt", "LICENSE"}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".", "build/")) or name.endswith(".so")]


def test_compress_runs_beside_a_distribution_that_owns_cli_py(wheel: Path, tmp_path: Path) -> None:
    hostile = toy_wheel(tmp_path, {"cli.py": "raise SystemExit('the wrong cli')\n"})
    python = environment(tmp_path / "venv", wheel, hostile)
    for program in ("compress", "mergekit-plus"):
        run = subprocess.run([python.with_name(program), "--help"], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stderr
        assert "quantize" in run.stdout
    merge = subprocess.run([python.with_name("compress"), "methods", "pcb"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "pcb (merge method, needs --base)" in merge.stdout, merge.stderr


@pytest.mark.parametrize("name", ["quant", "prune"])
def test_a_foreign_package_of_a_name_of_ours_is_named_instead_of_used(wheel: Path, tmp_path: Path, name: str) -> None:
    python = environment(tmp_path / "venv", wheel)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / name).mkdir(parents=True)
    (elsewhere / name / "__init__.py").write_text("")
    run = subprocess.run([python, "-m", "mergekit_plus", "--help"], capture_output=True, text=True, cwd=elsewhere, check=False)
    assert run.returncode != 0
    assert f"'{name}' at {elsewhere / name} is not mergekit-plus's" in run.stderr
    assert "Traceback" not in run.stderr


def toy_wheel(folder: Path, files: dict[str, str]) -> Path:
    """A wheel `toy` that installs these files at the top."""
    path = folder / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("toy-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
        archive.writestr("toy-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        record = "".join(f"{name},,\n" for name in [*files, "toy-1.dist-info/METADATA", "toy-1.dist-info/WHEEL", "toy-1.dist-info/RECORD"])
        archive.writestr("toy-1.dist-info/RECORD", record)
    return path
