"""python -m model "prompt": GPT-2 continues a text in the terminal, as it is written.

python -m model "Once upon a time" --max-new-tokens 60 --seed 1
echo "def hello_world():" | python -m model --greedy
python -m model --batch-file prompts.txt --json
python -m model "Hello" --random-weights --size gpt2
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from model import GPT2, GPT2Config
from model.attention.outside import add_import_option
from model.config import PRESETS
from model.generation.streaming import TextStreamer
from model.neighbours import require
from model.terminal import discard, one_line, shown, shown_json, write_anything

require("tokenizer")

from tokenizer import GPT2Tokenizer

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
PADDED_VOCABULARY = 50304  # to a multiple of 128: nanoGPT and others pad embeddings, not tokenizers


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input if it is - or not given")
    parser.add_argument("--batch-file", type=Path, help="continue each line of a UTF-8 file, but blank ones")
    parser.add_argument(
        "--special", action="store_true", help="read special tokens in a prompt, <|endoftext|>, as such"
    )
    parser.add_argument("--model", default="gpt2", help="a directory or a name on the Hub (default: gpt2)")
    parser.add_argument("--random-weights", action="store_true", help="do not load weights; see --size")
    parser.add_argument("--size", choices=PRESETS, default="gpt2", help="with --random-weights (default: gpt2)")
    parser.add_argument(
        "--attn", default="auto", help="attention backend: auto, triton, sdpa, eager, one of your own (default: auto)"
    )
    add_import_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: the checkpoint's)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(default: 100)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token; the default is to sample")
    parser.add_argument("--temperature", type=float, default=0.9, help="(default: 0.9)")
    parser.add_argument("--top-k", type=int, default=50, help="(default: 50; 0 for all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1.0)")
    parser.add_argument("--seed", type=int, help="the same seed, the same text")
    parser.add_argument("--lookup", type=int, default=0, metavar="N", help="draft N tokens from repetitions; greedy")
    parser.add_argument("--sliding-window", action="store_true", help="go on beyond the model's context")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and nothing else")
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.batch_file is not None:
        parser.error("both a prompt and --batch-file were given; one is required")
    return options


def read_prompts(options):
    """The texts to continue. Raises ValueError where one is empty."""
    if options.batch_file is not None:
        # Only newlines end a line: U+2028 or a form feed may stand in a text. A text file may begin with a BOM.
        lines = options.batch_file.read_bytes().decode("utf-8-sig").split("\n")
        prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    elif options.prompt is None or options.prompt == "-":
        prompts = [sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")]
    else:
        prompts = [options.prompt]
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; each needs some text")
    return prompts


def device_of(name):
    """The torch.device of a name. Raises ValueError where this machine has no such device."""
    try:
        torch.zeros(1, device=name).item()  # "meta" holds nothing that could be read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}; --device cpu always works") from None
    return torch.device(name)


def reach(name):
    """Raises FileNotFoundError where a checkpoint would have to come from the Hub, which cannot be reached.

    hf_hub_download would find the same, but only after half a minute of trying again.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if (
            Path(name).is_dir()
            or constants.HF_HUB_OFFLINE
            or isinstance(try_to_load_from_cache(name, "config.json"), str)
        ):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (errors.HfHubHTTPError, errors.HFValidationError):
        pass  # loading says it better
    except Exception as error:  # of whichever HTTP library there is
        raise FileNotFoundError(f"the Hub cannot be reached, and {name!r} is neither a directory nor cached") from error


def load(options):
    """(model, tokenizer), on the device."""
    dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
    device = device_of(options.device)
    if options.random_weights:
        torch.manual_seed(0 if options.seed is None else options.seed)
        model = GPT2(GPT2Config.preset(options.size), attn_implementation=options.attn).eval()
        model = model if dtype == "auto" else model.to(dtype)
        return model.to(device), GPT2Tokenizer.from_pretrained("gpt2")
    try:
        reach(options.model)
        model = GPT2.from_pretrained(options.model, attn_implementation=options.attn, dtype=dtype).to(device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; --random-weights needs no checkpoint") from error
    return model, tokenizer_of(options.model, model)


def tokenizer_of(name, model):
    """The checkpoint's tokenizer; where it has none, GPT-2's, and stderr says so. ValueError if that cannot be its."""
    try:
        return GPT2Tokenizer.from_pretrained(name)
    except FileNotFoundError:
        tokenizer, V = GPT2Tokenizer.from_pretrained("gpt2"), model.config.vocab_size
    if not len(tokenizer) <= V <= PADDED_VOCABULARY:
        raise ValueError(
            f"{name} has no tokenizer, and its vocabulary of {V} tokens is not GPT-2's of {len(tokenizer)}: save the "
            "one that it was trained with beside it, by tokenizer.save_pretrained"
        )
    print(f"model: {name} has no tokenizer; GPT-2's is taken", file=sys.stderr)
    return tokenizer


class Progress:
    """A stopping criterion that never stops: it records when each token came, for the tokens/s of the last line."""

    def __init__(self, device):
        self.device = device
        self.start = time.perf_counter()
        self.times = []

    def __call__(self, ids, scores):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def rates(self, prompt_tokens, new_tokens):
        """Tokens/s (of prefill, of decode); None where there was nothing to time."""
        if not self.times:
            return None, None
        decode = self.times[-1] - self.times[0]
        decoded = new_tokens - 1
        return prompt_tokens / (self.times[0] - self.start), decoded / decode if decode and decoded > 0 else None


class Teller(TextStreamer):
    """Streams to stdout, unless silent, and keeps the ids for what is printed after Ctrl-C."""

    def __init__(self, tokenizer, silent):
        super().__init__(tokenizer)
        self.silent = silent
        self.ids = []

    def put(self, ids):
        self.ids.extend(ids.flatten().tolist())
        super().put(ids)

    def on_text(self, text):
        if not self.silent:
            super().on_text(text)

    def on_end(self):
        if not self.silent:
            super().on_end()

    def fail(self, error):
        """run() ends it after Ctrl-C, and nobody hears it after an error."""


def main(arguments=None):
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    write_anything(sys.stdout)
    try:
        status = run(options, read_prompts(options), *load(options))
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        return 0
    except (OSError, ValueError) as error:
        print(one_line("model", error), file=sys.stderr)
        return 2
    return status


def run(options, prompts, model, tokenizer):
    special = {"allowed_special": "all"} if options.special else {"disallowed_special": ()}
    encoded = [tokenizer.encode(prompt, **special) for prompt in prompts]
    teller = Teller(tokenizer, silent=options.json) if len(prompts) == 1 else None
    model.pack_weights()  # before the clock starts
    progress = Progress(model.device)
    interrupted = False
    try:
        out = model.generate(
            encoded,
            max_new_tokens=options.max_new_tokens,
            do_sample=not (options.greedy or options.lookup),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            num_beams=1,  # whatever the checkpoint's generation_config says: it is one text, and streamed
            num_return_sequences=1,
            prompt_lookup_num_tokens=options.lookup,
            sliding_window=options.sliding_window,
            streamer=teller,
            stopping_criteria=[progress],
        )
        width = max(map(len, encoded))
        texts = [until_end(row[width - len(ids) :].tolist(), len(ids), model) for row, ids in zip(out, encoded)]
    except KeyboardInterrupt:
        interrupted = True
        if teller is not None:
            teller.end()
        texts = [teller.ids if teller is not None and teller.ids else ids for ids in encoded[:1]] + encoded[1:]
    report(options, prompts, encoded, texts, tokenizer, progress, interrupted)
    return INTERRUPTED if interrupted else 0


def until_end(text, prompt_length, model):
    """A row's ids up to its first EOS token, inclusive, without padding."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, (list, tuple)) else [eos]
    return next((text[: i + 1] for i in range(prompt_length, len(text)) if text[i] in eos), text)


def report(options, prompts, encoded, texts, tokenizer, progress, interrupted):
    """The texts, if they were not streamed, and the last line."""
    prompt_tokens = sum(map(len, encoded))
    new_tokens = [len(text) - len(ids) for text, ids in zip(texts, encoded)]
    prefill, decode = progress.rates(prompt_tokens, max(new_tokens))
    if options.json:
        for prompt, ids, text in zip(prompts, encoded, texts):
            row = {
                "prompt": prompt,
                "text": tokenizer.decode(text[len(ids) :]),
                "ids": text[len(ids) :],
                "seed": options.seed,
                "interrupted": interrupted,
                "prefill_tokens_per_s": prefill,
                "decode_tokens_per_s": decode,
            }
            print(shown_json(row, sys.stdout))
        return
    if len(prompts) > 1:
        for text in texts:
            print(shown(tokenizer.decode(text, skip_special_tokens=True), sys.stdout), end="\n\n")
    rates = [f"{name} {rate:.1f} tokens/s" for name, rate in (("prefill", prefill), ("decode", decode)) if rate]
    rows = f" in each of {len(prompts)} rows" if len(prompts) > 1 else ""
    print(f"[{prompt_tokens} + {max(new_tokens)} tokens{rows}; {', '.join(rates) or 'not timed'}]", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
