"""Installing, building and loading: what is decided, and the one sentence that is said when something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch

import prefix_kernels

CHECKOUT = Path(__file__).parent.parent.parent
PACKAGE = Path(prefix_kernels.__file__).parent
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
RELEASE = ".".join(torch.__version__.split(".")[:2])
SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".tsv", ".typed")
CPU_TORCH, CUDA_TORCH = "2.13.0+cpu", "2.14.1+cu130"


def _python(
    *arguments: str, executable: str = sys.executable, folder: str | Path = sys.prefix, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, by default one from which the checkout cannot be imported."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "MAX_JOBS")}
    return subprocess.run(
        [executable, *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _is_one_sentence(text: str) -> bool:
    return text.startswith("prefix_kernels") and text.endswith(".") and text.count("\n") == 0


@pytest.fixture(scope="module")
def build_environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_environment", CHECKOUT / "build_tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder that holds setuptools and nothing else, as the environment of an isolated build does."""
    folder = tmp_path / "tools"
    folder.mkdir()
    packages = Path(sysconfig.get_path("purelib"))
    for part in [*packages.glob("setuptools*"), packages / "_distutils_hack"]:
        (folder / part.name).symlink_to(part)
    return folder


@pytest.fixture
def bare_python(tmp_path: Path, tools: Path) -> tuple[str, dict[str, str]]:
    """A Python with setuptools and nothing else, and the environment variables it needs."""
    home = tmp_path / "bare"
    venv.create(home, with_pip=False)
    return str(home / "bin" / "python"), {"PYTHONPATH": str(tools)}


# Building


def _build(tmp_path: Path, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    return _python("setup.py", "--quiet", "build_ext", *folders, executable=python, folder=CHECKOUT, **environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"PATH": "/nonexistent"},
            "no C++ compiler was found (looked for g++, c++, clang++): run `apt-get",
        ),
        ({"CXX": "/nonexistent/g++"}, "no C++ compiler was found (looked for /nonexistent/g++): run `apt-get"),
        ({"CXX": "false"}, "cannot compile C++20: run `apt-get install g++`"),
        (
            {"PREFIX_KERNELS_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "PREFIX_KERNELS_CUDA=1 cannot be honoured, because ",
        ),
        ({"PREFIX_KERNELS_CUDA": "yes"}, "PREFIX_KERNELS_CUDA: expected 0, 1 or unset, got 'yes'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a positive integer, got 'many'"),
    ],
    ids=["no compiler", "wrong CXX", "old compiler", "CUDA wanted", "CUDA unclear", "jobs unclear"],
)
def test_a_build_that_cannot_work_ends_with_one_sentence(environment, expected, tmp_path):
    run = _build(tmp_path, **environment)
    assert run.returncode != 0
    assert expected in run.stderr
    assert _is_one_sentence(run.stderr.strip())


def test_building_without_torch_says_to_install_it(bare_python, tmp_path):
    python, environment = bare_python
    run = _build(tmp_path, python, **environment)
    assert run.returncode != 0
    assert f"run `{python} -m pip install 'torch>=2.11'` first" in run.stderr
    assert _is_one_sentence(run.stderr.strip())


def test_building_with_an_old_torch_says_to_upgrade_it(bare_python, tools, tmp_path):
    python, environment = bare_python
    _write_torch(tools, "2.10.0")
    run = _build(tmp_path, python, **environment)
    assert run.returncode != 0
    assert "PyTorch 2.10.0 in" in run.stderr
    assert "is too old to compile against: run" in run.stderr
    assert _is_one_sentence(run.stderr.strip())


def _write_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    torch_folder = folder / "torch"
    torch_folder.mkdir()
    (torch_folder / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (torch_folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return torch_folder


REQUIREMENTS = (
    "import build_tools.backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"
)


def test_an_isolated_build_uses_the_torch_of_the_target_environment(tools):
    """pip hides the target's packages from the build by a module on PYTHONPATH, as here; no torch is then asked for."""
    (tools / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "hidden = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}\n"
        "sys.path[:] = [entry for entry in sys.path if entry not in hidden]\n"
    )
    path = os.pathsep.join([str(CHECKOUT), str(tools)])
    assert "No module named 'torch'" in _python("-c", "import torch", PYTHONPATH=path).stderr
    run = _python("-c", REQUIREMENTS, PYTHONPATH=path, PYTHONNOUSERSITE="1")
    assert run.stdout.strip() == "[] []", run.stderr
    found = "from build_tools.environment import find_torch; print(find_torch().requirement)"
    assert _python("-c", found, PYTHONPATH=path).stdout.strip() == f"torch=={RELEASE}.*"


def test_an_isolated_build_asks_for_torch_where_the_target_has_none(bare_python):
    python, environment = bare_python
    path = os.pathsep.join([str(CHECKOUT), environment["PYTHONPATH"]])
    run = _python("-c", REQUIREMENTS, executable=python, PYTHONPATH=path)
    assert run.stdout.strip() == "['torch>=2.11'] ['torch>=2.11']", run.stderr


def test_an_isolated_build_without_a_compiler_ends_before_anything_is_downloaded(bare_python):
    python, environment = bare_python
    path = os.pathsep.join([str(CHECKOUT), environment["PYTHONPATH"]])
    run = _python("-c", REQUIREMENTS, executable=python, PYTHONPATH=path, PATH="/nonexistent")
    assert run.returncode != 0
    assert "no C++ compiler was found" in run.stderr
    assert _is_one_sentence(run.stderr.strip())


def _copy_sources(tree: Path) -> list[str]:
    files = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".clang-format"]
    for folder in ("build_tools", "csrc", "prefix_kernels", "tests", "examples"):
        sources = (path for path in (CHECKOUT / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES)
        files += [str(path.relative_to(CHECKOUT)) for path in sources if path.name != "_compiled_torch.py"]
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / file, tree / file)
    return files


def test_a_source_distribution_needs_no_torch_and_holds_every_source(bare_python, tmp_path):
    python, environment = bare_python
    tree = tmp_path / "tree"
    files = _copy_sources(tree)
    (tree / "prefix_kernels" / "_compiled_torch.py").write_text('VERSION = "of this machine"')
    make = f"import os; os.chdir({str(tree)!r}); import build_tools.backend as b; print(b.build_sdist('.'))"
    path = os.pathsep.join([str(tree), environment["PYTHONPATH"]])
    run = _python("-c", make, executable=python, PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    with tarfile.open(tree / run.stdout.split()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) <= held, set(files) - held
    assert "prefix_kernels/_compiled_torch.py" not in held


def test_a_wheel_holds_the_mark_of_a_typed_package(bare_python, tmp_path):
    python, environment = bare_python
    tree, built = tmp_path / "tree", tmp_path / "built"
    _copy_sources(tree)
    run = _python(
        "setup.py", "--quiet", "build_py", "--build-lib", str(built), executable=python, folder=tree, **environment
    )
    assert run.returncode == 0, run.stderr
    assert (built / "prefix_kernels" / "__init__.py").is_file()
    assert (built / "prefix_kernels" / "py.typed").is_file()


def test_no_header_hides_one_of_the_system(build_environment):
    """Whoever adds a folder of ``csrc`` to the include path must still find ``<limits.h>`` and its like."""
    names = {path.name for path in (CHECKOUT / "csrc").rglob("*.h")}
    tests = "".join(f"#if __has_include(<{name}>)\n#error {name}\n#endif\n" for name in sorted(names))
    command = [*build_environment.find_compiler(), "-x", "c++", "-fsyntax-only", "-"]
    run = subprocess.run(command, input=tests, capture_output=True, text=True, check=False)
    assert names and run.returncode == 0, run.stderr


def _plan(build_environment, torch_version, cuda, toolkit_version, sources=("kernel.cu",), **environ):
    toolkit = toolkit_version and build_environment.CudaToolkit(Path("/usr/local/cuda"), toolkit_version)
    found = build_environment.Torch(Path("/torch"), torch_version, cuda)
    return build_environment.plan_cuda(found, toolkit, sources, environ)


def test_cuda_kernels_are_built_where_toolkit_and_torch_agree(build_environment):
    plan = _plan(build_environment, CUDA_TORCH, "13.0", "13.1")
    assert plan.architectures == ("8.0", "9.0+PTX")
    assert plan.reason == "CUDA 13.1 kernels"
    codes = [("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90")]
    assert plan.gencode_flags == [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
    plan = _plan(build_environment, CUDA_TORCH, "13.0", "13.0", TORCH_CUDA_ARCH_LIST="8.6; 9.0+PTX")
    assert plan.architectures == ("8.6", "9.0+PTX")
    assert plan.gencode_flags[-1] == "-gencode=arch=compute_90,code=compute_90"


@pytest.mark.parametrize(
    ("torch_version", "cuda", "toolkit", "sources", "obstacle"),
    [
        (CUDA_TORCH, "13.0", "13.0", (), "this version has CPU kernels only"),
        (CPU_TORCH, None, "13.0", ("kernel.cu",), f"PyTorch {CPU_TORCH} is not a CUDA build"),
        (CUDA_TORCH, "13.0", None, ("kernel.cu",), "no CUDA toolkit was found"),
        (CUDA_TORCH, "13.0", "12.8", ("kernel.cu",), "the CUDA toolkit in /usr/local/cuda is 12.8, PyTorch was built"),
    ],
    ids=["no sources", "CPU torch", "no toolkit", "other major version"],
)
def test_cuda_kernels_are_left_out_with_a_reason_or_refused(
    build_environment, torch_version, cuda, toolkit, sources, obstacle
):
    plan = _plan(build_environment, torch_version, cuda, toolkit, sources)
    assert plan.architectures == ()
    assert plan.reason.startswith(f"no CUDA kernels: {obstacle}")
    with pytest.raises(SystemExit) as refusal:
        _plan(build_environment, torch_version, cuda, toolkit, sources, PREFIX_KERNELS_CUDA="1")
    assert f"PREFIX_KERNELS_CUDA=1 cannot be honoured, because {obstacle}" in str(refusal.value)
    assert _is_one_sentence(str(refusal.value))


def test_cuda_kernels_are_left_out_when_asked(build_environment):
    plan = _plan(build_environment, CUDA_TORCH, "13.0", "13.0", PREFIX_KERNELS_CUDA="0")
    assert plan.architectures == ()


def test_the_cuda_toolkit_is_found_by_its_compiler_and_headers(build_environment, tmp_path):
    environ = {"CUDA_HOME": str(tmp_path), "PATH": ""}
    assert build_environment.find_cuda_toolkit(environ) is None
    nvcc, header = tmp_path / "bin" / "nvcc", tmp_path / "include" / "cuda_runtime_api.h"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert build_environment.find_cuda_toolkit(environ) is None
    header.parent.mkdir()
    header.touch()
    assert build_environment.find_cuda_toolkit(environ) == build_environment.CudaToolkit(tmp_path, "13.0")


def test_compilers_side_by_side_are_bounded_by_memory(build_environment, monkeypatch):
    monkeypatch.setattr(build_environment.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(build_environment, "_free_memory", lambda: 9 * 2**30)
    assert build_environment.parallel_jobs({}) == 4
    assert build_environment.parallel_jobs({"MAX_JOBS": "7"}) == 7
    monkeypatch.setattr(build_environment, "_free_memory", lambda: 2**20)
    assert build_environment.parallel_jobs({}) == 1


def test_other_processors_get_the_portable_kernels(build_environment):
    assert build_environment.cpu_isas("x86_64") == ("portable", "avx2", "avx512")
    assert build_environment.cpu_isas("aarch64") == ("portable",)


# Loading


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The installed package in a folder of its own, to be damaged."""
    copy = tmp_path / "copy" / "prefix_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _python_with(package_folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package in this folder is the only one.

    An editable install of the checkout hooks itself into every import and would supply what the copy lacks; ``-S``
    leaves such hooks out, and with them the site folders, which are named instead.
    """
    found = [entry for entry in sys.path if entry and Path(entry).resolve() != CHECKOUT]
    return _python("-S", *arguments, PYTHONPATH=os.pathsep.join([str(package_folder), *found]))


def _import_failure(folder: Path, prelude: str = "") -> str:
    """The message of ``import prefix_kernels`` in a Python with this folder first, checked for its form."""
    code = f"{prelude}\ntry:\n import prefix_kernels\nexcept ImportError as error:\n print(error)"
    run = _python_with(folder, "-c", code)
    assert run.returncode == 0, run.stderr
    message = run.stdout.strip()
    assert _is_one_sentence(message), message
    return message


def test_importing_without_torch_says_to_install_it(copied_package):
    message = _import_failure(copied_package.parent, prelude="import sys; sys.modules['torch'] = None")
    assert message == (f"prefix_kernels needs PyTorch, which is not installed: run `pip install 'torch=={RELEASE}.*'`.")


def test_importing_with_another_torch_says_to_compile_anew(copied_package):
    """The fake torch has nothing but a version: the check comes before anything of torch is used."""
    _write_torch(copied_package.parent, "2.99.0")
    message = _import_failure(copied_package.parent)
    assert f"compiled against PyTorch {torch.__version__}, but PyTorch 2.99.0 is installed" in message
    assert "run `pip install --force-reinstall --no-deps --no-cache-dir " in message
    assert f"or `pip install 'torch=={RELEASE}.*'`" in message


def test_another_patch_release_of_torch_is_accepted(copied_package):
    (copied_package / "_compiled_torch.py").write_text(f'VERSION = "{RELEASE}.99+other"\n')
    run = _python_with(copied_package.parent, "-c", "import prefix_kernels; print(prefix_kernels.__file__)")
    assert run.stdout.strip() == str(copied_package / "__init__.py"), run.stderr


def test_importing_the_source_folder_unbuilt_says_to_build_it(copied_package):
    (copied_package / "_compiled_torch.py").unlink()
    (copied_package / EXTENSION).unlink()
    folder = copied_package.parent
    (folder / "setup.py").touch()
    message = _import_failure(folder)
    assert f"has not been built: run `pip install {folder}`" in message
    assert f"or `pip install -e {folder}`" in message


def test_importing_what_another_python_compiled_says_to_compile_anew(copied_package):
    (copied_package / EXTENSION).rename(copied_package / "_C.cpython-399-x86_64-linux-gnu.so")
    message = _import_failure(copied_package.parent)
    assert message.startswith("prefix_kernels was not compiled for this Python")
    assert "run `pip install --force-reinstall --no-deps --no-cache-dir " in message


def test_a_module_that_does_not_load_says_to_compile_anew(copied_package):
    (copied_package / EXTENSION).write_bytes(b"no shared object")
    message = _import_failure(copied_package.parent)
    assert message.startswith("prefix_kernels could not load its compiled module")
    assert "run `pip install --force-reinstall --no-deps --no-cache-dir " in message


def test_running_the_unbuilt_package_shows_no_traceback(copied_package):
    (copied_package / "_compiled_torch.py").unlink()
    run = _python_with(copied_package.parent, "-m", "prefix_kernels")
    assert run.returncode != 0
    assert "has not been built: run `pip install" in run.stderr
    assert "Traceback" not in run.stderr


# What is installed


def test_the_installed_package_asks_for_the_torch_it_was_compiled_against():
    requirements = importlib.metadata.requires("prefix_kernels")
    assert f"torch=={RELEASE}.*" in requirements
    assert prefix_kernels._library.load().build_info()["torch"].startswith(f"{RELEASE}.")


def test_the_module_knows_how_it_was_compiled():
    info = prefix_kernels._library.load().build_info()
    assert info["openmp"] is True
    assert info["cxx_standard"] >= 202002
    assert info["cpu_isas"][0] == "portable"
    assert torch.ops.prefix_kernels.cpu_isa() in info["cpu_isas"]
    if torch.version.cuda is None:
        assert info["cuda_architectures"] == [] and info["cuda_toolkit"] is None


def test_the_report_of_the_package_checks_the_cpu():
    run = _python("-m", "prefix_kernels")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("OK\n")
    assert "FAILED" not in run.stdout
    for name in ("torch:", "compiler:", "CPU kernels:", "threads:", "CUDA kernels:", "cpu     bfloat16"):
        assert name in run.stdout


def test_the_report_of_a_wrong_kernel_fails():
    """The check of the devices must be able to fail: here every result of the operator is off by one percent."""
    spoil = (
        "import sys, prefix_kernels.__main__ as m; right = m.prefix_attention; "
        "m.prefix_attention = lambda *a, **k: right(*a, **k) * 1.01; sys.exit(m.main())"
    )
    run = _python("-c", spoil)
    assert run.returncode == 1
    assert "FAILED" in run.stdout
