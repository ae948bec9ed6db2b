"""python -m model.convert SOURCE DIR --to FORMAT: checkpoints from one project's format to another's.

python -m model.convert out/ckpt.pt gpt2-small                 # nanoGPT's, to Hugging Face's safetensors
python -m model.convert 124M gpt2 --to nanogpt                 # OpenAI's original, without TensorFlow
python -m model.convert gpt2 bin --to llmc                     # a directory, or a name on the Hub

SOURCE is recognised: a directory or Hub name that GPT2.from_pretrained loads, a ckpt.pt of nanoGPT, a model .bin of
llm.c, a directory with hparams.json and model.ckpt.* of OpenAI's. It is read whole or refused with the tensor.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from model import GPT2
from model.__main__ import reach
from model.checkpoints.atomic import flush_directory
from model.checkpoints.formats import build, llmc, nanogpt, openai
from model.terminal import one_line

FORMATS = {"nanogpt": nanogpt, "llmc": llmc, "openai": openai}


def main(arguments=None):
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a checkpoint")
    parser.add_argument("directory", type=Path, help="where to write; made if need be")
    parser.add_argument("--to", choices=("safetensors", *FORMATS), default="safetensors", help="(default: safetensors)")
    options = parser.parse_args(arguments)
    try:
        kind, model, notes = load(options.source)
        notes += save(model, options.directory, options.to)
    except (OSError, ValueError) as error:
        print(one_line("model.convert", error), file=sys.stderr)
        return 2
    numbers = f"{len(model.state_dict())} tensors, {model.num_parameters():,} parameters"
    print("\n".join([f"{kind} -> {options.to}: {numbers}", *notes]))
    return 0


def load(source):
    """(the name of its format, a GPT2 in eval mode, what there is to say) of a checkpoint."""
    for name, module in FORMATS.items():
        if Path(source).exists() and module.is_one(source):
            weights = module.read(source)
            return name, build(weights, source), [*weights.notes]
    if Path(source).is_file():
        raise ValueError(f"{source} is a file of no format that is read: {', '.join(FORMATS)}")
    reach(source)
    return "safetensors", GPT2.from_pretrained(source), []


def save(model, directory, to):
    """Writes the model in a format; returns what there is to say. What was there before is replaced whole, or stays."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a directory to write to is required")
    if to == "safetensors":
        model.save_pretrained(directory)
        return []
    name, write, notes, *rest = FORMATS[to].write(model)
    directory.mkdir(parents=True, exist_ok=True)
    for other, content in rest[0].items() if rest else ():
        _write(directory / other, lambda file, content=content: file.write(content))
    _write(directory / name, write)
    return notes


def _write(path, write):
    """A file of what write(file) writes, which takes the place of an earlier one only when it is whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise
    flush_directory(path.parent)


if __name__ == "__main__":
    sys.exit(main())
