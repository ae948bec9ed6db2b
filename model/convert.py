"""python -m model.convert SOURCE DIR --to FORMAT: a checkpoint of another project as one of ours, or the other way.

SOURCE, whose kind is found out: a directory in Hugging Face's layout (safetensors or pickles), with Flax's
flax_model.msgpack or TensorFlow's tf_model.h5 (with the package h5py), OpenAI's original one with hparams.json and
model.ckpt.*; or a file: nanoGPT's ckpt.pt, llm.c's .bin.
FORMAT: safetensors (the default), nanogpt (ckpt.pt), llmc (model.bin), openai (model.ckpt.*, hparams.json),
gguf and gguf-q8_0 (model.gguf, for llama.cpp; in fp16 or eight bits).

python -m model.convert 124M gpt2
python -m model.convert out/ckpt.pt gpt2 --vocab-size 50257
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from model.checkpoints.atomic import flush_directory, unused_name, write_new_file
from model.checkpoints.files import FORMATS, Source, blame, listed, read_checkpoint
from model.config import GPT2Config
from model.formats import flax, gguf, llmc, nanogpt, openai, tensorflow_h5
from model.formats.found import Found, cut_vocabulary

TARGETS = ("safetensors", "nanogpt", "llmc", "openai", "gguf", "gguf-q8_0")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def detect(source):
    """(what the source is, in words; a function of a progress callback that reads it). ValueError for another kind."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"convert: {path} is not there; a directory or a file is required")
    if openai.is_openai(path):
        return "OpenAI's TensorFlow checkpoint", lambda progress: openai.read(path, progress)
    if path.is_dir() and any((path / name).is_file() for name in FORMATS):
        return "Hugging Face's layout", lambda progress: _hugging_face(path)
    if flax.is_flax(path):
        return "Flax's msgpack", lambda progress: flax.read(path)
    if tensorflow_h5.is_h5(path):
        return "TensorFlow's h5", lambda progress: tensorflow_h5.read(path)
    if llmc.is_llmc(path):
        return "llm.c's .bin", lambda progress: llmc.read(path)
    if nanogpt.is_nanogpt(path):
        return "nanoGPT's checkpoint", lambda progress: nanogpt.read(path)
    raise ValueError(f"convert: {path} is none of the kinds that python -m model.convert --help lists")


def _hugging_face(path):
    stored = read_checkpoint(Source(path))
    with blame(stored.config_path):
        config = GPT2Config.from_dict(stored.config)
    return Found(config, dict(stored.tensors), {name: name for name in stored.tensors})


def convert(
    source, directory, to="safetensors", *, dtype=None, vocab_size=None, report=lambda line: None, progress=None
):
    """Reads the checkpoint `source` and writes it into `directory` as `to`; returns the paths written.

    dtype: a torch.dtype to write; None keeps the source's (OpenAI's format is fp32, llm.c's fp32 or bf16). vocab_size:
    cuts the embedding to so many rows. report: gets a line for each thing that a user should know. progress: called
    with each tensor's name. Nothing is written unless the source was read whole; raises ValueError where it cannot be.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: to is {to!r:.60}; choose one of {', '.join(TARGETS)}")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"convert: {directory} is a file; a directory to write to is required")
    if directory.is_dir() and Path(source).is_dir() and directory.samefile(source):
        raise ValueError(f"convert: {directory} is the source; another directory is required")
    kind, read = detect(source)
    report(f"{source}: {kind}")
    found = read(progress or (lambda name: None))
    if vocab_size is not None:
        cut_vocabulary(found, vocab_size)
    with blame(source):
        model = found.model()
    for line in _told(found):
        report(line)
    if dtype is not None:
        model.to(dtype)
    if to == "safetensors":
        model.save_pretrained(directory)
        return [directory / "config.json", directory / "model.safetensors"]
    written, notes = _write(model, directory, to, Path(source))
    for note in notes:
        report(note)
    return written


def _told(found):
    renamed = {name: theirs for name, theirs in found.renamed.items() if name != theirs}
    yield f"{len(found.tensors)} tensors, {len(renamed)} of them under other names"
    for name, theirs in list(renamed.items())[:3]:
        yield f"  {theirs} -> {name}"
    if found.dropped:
        yield f"dropped: {listed(found.dropped)}"
    if found.config.tie_word_embeddings:
        yield "tied: lm_head.weight is transformer.wte.weight"
    yield from found.notes


def _write(model, directory, to, source):
    """Another project's files, which take their names together once all are written. (paths, notes)"""
    directory.mkdir(parents=True, exist_ok=True)
    staging, notes = directory / f".converting-{unused_name()}", []
    staging.mkdir()
    try:
        if to == "nanogpt":
            with open(staging / "ckpt.pt", "xb") as file:
                notes += nanogpt.write(model, file)
        elif to == "llmc":
            if model.dtype not in llmc.DTYPES.values():
                raise ValueError(f"convert: the weights are {model.dtype}; llm.c's are float32 or bfloat16: --dtype")
            write_new_file(staging / "model.bin", llmc.chunks(model))
        elif to.startswith("gguf"):
            beside = source if source.is_dir() else source.parent
            vocabulary = gguf.read_vocabulary(beside, model.config.vocab_size)
            write_new_file(staging / "model.gguf", gguf.chunks(model, *vocabulary, quantised=to == "gguf-q8_0"))
        else:
            openai.write(model, staging)
            for name in openai.TOKENIZER:
                if (source / name).is_file():
                    shutil.copyfile(source / name, staging / name)
                else:
                    notes.append(f"{name}, the tokenizer's, is not beside the source and has to be put there")
        names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name.endswith(".index"), name))
        for name in names:
            (staging / name).replace(directory / name)
        flush_directory(directory)
        return [directory / name for name in names], notes
    finally:
        shutil.rmtree(staging)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--to", choices=TARGETS, default="safetensors")
    parser.add_argument("--dtype", choices=_DTYPES, help="(default: the source's)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="cut the padding behind the first N rows of wte")
    options = parser.parse_args(arguments)
    try:
        with tqdm(unit=" tensors", disable=not sys.stderr.isatty()) as bar:
            written = convert(
                options.source,
                options.directory,
                options.to,
                dtype=_DTYPES.get(options.dtype),
                vocab_size=options.vocab_size,
                report=print,
                progress=lambda name: bar.update(),
            )
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print("wrote " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
