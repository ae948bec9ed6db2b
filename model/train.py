"""python -m model.train: GPT-2 from text, on a CPU, a GPU, or by torchrun on many.

python -m model.train --text builtin --size tiny --steps 500 --out out/tiny      # a laptop, ten minutes
python -m model.train --data data --size gpt2 --dtype bfloat16 --out out/gpt2    # shards of tokenizer.prepare
python -m model.train --data data --size gpt2 --out out/gpt2 --resume            # goes on, to the bit
torchrun --nproc-per-node 8 -m model.train --data data --size gpt2 --out out/gpt2        # or gpt2-xl, --shard

--out holds the newest weights (GPT2.from_pretrained), the tokenizer, log.jsonl with a loss for each step, loss.png, the
best weights by validation loss in best/, and in training/ what --resume needs.

--dtype        weights, their gradients, AdamW's moments    matrix products     residual stream
float32        fp32                                         fp32                fp32
bfloat16       fp32                                         bf16 (autocast)     fp32
float16        fp32, the loss scaled                        fp16 (autocast)     fp32
pure-bfloat16  fp32 (master weights)                        bf16                bf16
pure-bfloat16 computes with a bf16 copy of the weights, made at each micro-batch; each bf16 gradient is added to the
fp32 one. All checkpoints hold fp32. Sums within a kernel are fp32 always.

With --shard each process saves what it holds (torch.distributed.checkpoint, as safetensors), and the first one all
weights for from_pretrained. --resume takes any number of processes, with or without --shard, if --accumulate times
their number stays.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from model import GPT2, GPT2Config
from model.attention.outside import add_import_option
from model.config import PRESETS
from model.terminal import one_line, shown, write_anything
from model.training.loop import DTYPES, Settings, Training
from model.training.processes import Processes, lost
from tokenizer import GPT2Tokenizer
from tokenizer.prepare import documents, find, prepare, vocabulary_hash

TINY = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256}  # and a vocabulary of its own
TINY_VOCABULARY = 2048
LEARNED_FROM = 2_000_000  # characters of the text, at its start, that a vocabulary is learned from
INTERRUPTED, LOST = 130, 3


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m model.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a directory of shards, as tokenizer.prepare writes them")
    source.add_argument("--text", nargs="+", help="files, directories, or builtin: prepared in OUT/data first")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the run")
    parser.add_argument("--size", choices=("tiny", *PRESETS), default="tiny", help="(default: tiny)")
    parser.add_argument("--from", dest="checkpoint", help="begin with the weights of a directory or a Hub repository")
    parser.add_argument("--vocabulary", help="of --text: a directory or Hub name (default: gpt2; tiny learns its own)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--attn", default="auto", help="attention backend (default: auto)")
    add_import_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard", action="store_true", help="split the model among torchrun's processes (FSDP2)")
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="torchrun's processes compute each micro-batch together, by heads",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--sample", metavar="PROMPT", help="continue this text at each evaluation")
    of_tiny = {"batch": 16, "seq_len": 128, "lr": 1e-3}
    for field in dataclasses.fields(Settings):
        name, default = f"--{field.name.replace('_', '-')}", field.default
        if field.type in (bool, "bool"):
            parser.add_argument(name, action="store_true")
            continue
        words = (
            f"(default: {of_tiny.get(field.name, default)})" if default is not None else "(default: a tenth of --lr)"
        )
        kind = {"int": int, "str": str}.get(str(getattr(field.type, "__name__", field.type)), float)
        choices = tuple(DTYPES) if field.name == "dtype" else None
        parser.add_argument(name, type=kind, default=of_tiny.get(field.name, default), choices=choices, help=words)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    write_anything(sys.stderr)
    processes = None
    try:
        if options.out.exists() and not options.out.is_dir():
            raise ValueError(f"--out {options.out} is a file; a run needs a directory")
        settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
        processes = Processes(_device(options.device), options.shard, options.tensor_parallel)
        tokenizer, data = _text(options, processes)
        sample = _sampler(options.sample, tokenizer)
        model = _model(options, tokenizer)
        run = Training(model, data, options.out, settings, processes=processes, resume=options.resume)
        if tokenizer is not None and processes.is_first:
            tokenizer.save_pretrained(options.out)
        run.train(sample)
    except KeyboardInterrupt:
        print(f"model.train: stopped; --resume goes on from {options.out}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, TypeError) as error:
        print(one_line("model.train", error), file=sys.stderr)
        return 2
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            words = str(error).partition("\n")[0]
            print(
                f"model.train: out of memory ({words}); --batch of fewer rows with more of --accumulate, "
                "--gradient-checkpointing or --dtype pure-bfloat16 need less",
                file=sys.stderr,
            )
            return 2
        if processes is None or processes.size == 1 or not lost(error):
            raise
        words = str(error).partition("\n")[0]
        print(
            f"model.train: process {processes.rank} has lost another one ({words}); "
            f"--resume goes on from {options.out}",
            file=sys.stderr,
        )
        processes = None  # a farewell to those who are gone may not end
        return LOST
    finally:
        if processes is not None:
            processes.close()
    return 0


def _device(name):
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}; --device cpu always works") from None
    return torch.device(name)


def _text(options, processes):
    """(the tokenizer, or None where nobody named one; the directory of the shards), prepared by the first process."""
    if options.data is not None:
        if options.vocabulary is None:
            return None, options.data
        tokenizer = GPT2Tokenizer.from_pretrained(options.vocabulary)
        record = options.data / "prepare.json"
        if record.is_file():
            asked = json.loads(record.read_text(encoding="utf-8"))["asked"]
            if asked["vocabulary"] != vocabulary_hash(tokenizer):
                raise ValueError(f"--vocabulary {options.vocabulary} is not what {options.data} was prepared with")
        return tokenizer, options.data
    if "-" in options.text:
        raise ValueError(
            "--text -: standard input can be read only once; give it to tokenizer.prepare, and --data here"
        )
    folder, data = options.out / "tokenizer", options.out / "data"
    if processes.is_first:
        if not folder.exists():
            _tokenizer(options).save_pretrained(folder)
        prepare(options.text, data, GPT2Tokenizer.from_pretrained(folder), validate=50)
    processes.wait()
    return GPT2Tokenizer.from_pretrained(folder), data


def _tokenizer(options):
    """The tokenizer named; of "tiny", one learned from the text."""
    if options.vocabulary is not None or options.size != "tiny" or options.checkpoint is not None:
        return GPT2Tokenizer.from_pretrained(options.vocabulary or options.checkpoint or "gpt2")
    texts, room = [], LEARNED_FROM
    for text in documents(find(options.text)):
        texts.append(text[:room])
        room -= len(texts[-1])
        if not room:
            break
    return GPT2Tokenizer.train(texts, TINY_VOCABULARY)


def _model(options, tokenizer):
    torch.manual_seed(options.seed)
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), options.dropout)
    if options.checkpoint is not None:
        model = GPT2.from_pretrained(
            options.checkpoint, attn_implementation=options.attn, dtype=torch.float32, **dropout
        )
    else:
        values = dict(TINY) if options.size == "tiny" else {}
        if tokenizer is not None:
            values["vocab_size"] = len(tokenizer)
            values["bos_token_id"] = values["eos_token_id"] = tokenizer.eos_token_id
        config = GPT2Config.preset("gpt2" if options.size == "tiny" else options.size, **values, **dropout)
        model = GPT2(config, attn_implementation=options.attn)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _sampler(prompt, tokenizer):
    if prompt is None:
        return None
    if tokenizer is None:
        raise ValueError("--sample needs the tokenizer of --data: --vocabulary")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--sample is empty; a text goes on from one token at least")

    def sample(model):
        said = model.generate([ids], max_new_tokens=40, do_sample=True, temperature=0.8, seed=0)
        print(shown("\n" + tokenizer.decode(said[0].tolist()) + "\n", sys.stderr), file=sys.stderr)

    return sample


if __name__ == "__main__":
    sys.exit(main())
