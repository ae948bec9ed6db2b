"""python -m model.evaluate: how well a checkpoint predicts a text, or the last word of each line.

python -m model.evaluate book.txt --model gpt2                     # loss and perplexity
python -m model.evaluate book.txt --model out/tiny --stride 64 --json
python -m model.evaluate lines.txt --last-word                     # accuracy, as LAMBADA is scored
python -m model.evaluate book.txt --model gpt2 --weights int8      # what generate(weights="int8") would make of it

Each token but the first is predicted once: with a stride S, windows of T tokens begin every S tokens, and of each only
what no earlier one has predicted counts. All but the first T then have at least T - S tokens before them; T - 1 is the
fastest stride and the harshest. Perplexity is per token; bits per byte compares vocabularies. With --weights int8 the
matrices are what the decode kernels' integers stand for, and the error that this makes in each layer's products, on the
first window of the text and in float64, is told before the result.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from kernels.decode import WEIGHTS
from model import GPT2
from model.__main__ import device_of, reach, tokenizer_of
from model.attention.outside import add_import_option
from model.generation.rounded import product_errors, rounded
from model.terminal import one_line


def main(arguments=None):
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="a UTF-8 file, or - for standard input")
    parser.add_argument("--model", default="gpt2", help="a directory or a name on the Hub (default: gpt2)")
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens in a window (default: the model's)")
    parser.add_argument("--stride", type=int, metavar="S", help="tokens between windows (default: half of T)")
    parser.add_argument("--last-word", action="store_true", help="the last word of each line instead")
    parser.add_argument("--attn", default="auto", help="attention backend (default: auto)")
    parser.add_argument("--weights", choices=WEIGHTS, default="model", help="(default: model)")
    add_import_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    try:
        content = sys.stdin.buffer.read() if options.text == "-" else Path(options.text).read_bytes()
        text = _decoded(content, options.text)
        device = device_of(options.device)
        reach(options.model)
        dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
        model = GPT2.from_pretrained(options.model, attn_implementation=options.attn, dtype=dtype).to(device)
        tokenizer = tokenizer_of(options.model, model)
        layers = []
        if options.weights == "int8":
            first = tokenizer.encode_ordinary(text)[: model.config.n_positions]
            if not first:
                raise ValueError("--weights int8: the text has 0 tokens; the layers' errors need one")
            layers = product_errors(model, torch.tensor([first], device=model.device))
            model = rounded(model)
        if options.last_word:
            result = last_word_accuracy(model, tokenizer, text.splitlines(), progress=not options.json)
        else:
            result = perplexity(
                model, tokenizer, text, T=options.seq_len, stride=options.stride, progress=not options.json
            )
    except KeyboardInterrupt:
        print("model.evaluate: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(one_line("model.evaluate", error), file=sys.stderr)
        return 2
    if options.json and layers:
        result["layers"] = layers
    for errors in layers if not options.json else ():
        told = ", ".join(f"{name} {value:.2e}" for name, value in errors.items() if name != "layer")
        print(f"layer {errors['layer']}: error of products in int8: {told}")
    print(json.dumps(result) if options.json else ", ".join(f"{name} {value:.6g}" for name, value in result.items()))
    return 0


def _decoded(content, name):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "standard input" if name == "-" else name
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}: {error.reason})") from None


@torch.no_grad()
def perplexity(model, tokenizer, text, *, T=None, stride=None, progress=False):
    """{loss: nats per token, perplexity, bits_per_byte, tokens: those predicted} of a text.

    T: tokens in a window, by default the model's n_positions. stride: by default T // 2. Raises ValueError for a window
    or a stride that cannot be, and for a text of fewer than two tokens.
    """
    T = model.config.n_positions if T is None else T
    stride = T // 2 if stride is None else stride
    if not 2 <= T <= model.config.n_positions:
        raise ValueError(
            f"perplexity: windows of {T} tokens; 2 to n_positions = {model.config.n_positions} are possible"
        )
    if not 1 <= stride < T:
        raise ValueError(
            f"perplexity: stride is {stride}; it must be from 1 to {T - 1}: windows have {T} tokens and share one"
        )
    ids = torch.tensor(tokenizer.encode_ordinary(text), device=model.device)
    if len(ids) < 2:
        raise ValueError(
            f"perplexity: the text has {len(ids)} tokens; the first has nothing before it, so 2 are needed"
        )
    total, known = 0.0, 1  # tokens that are predicted, or need not be
    with tqdm(total=len(ids) - 1, unit="token", desc="evaluating", disable=None if progress else True) as bar:
        for start in range(0, len(ids), stride):
            window = ids[start : start + T]
            end = start + len(window)
            labels = window.clone()
            labels[: known - start] = -100  # known earlier, or nothing is before it
            new = end - known
            if new > 0:
                total += float(model(window[None], labels=labels[None], return_logits=False).loss) * new
                bar.update(new)
            known = end
            if end == len(ids):
                break
    predicted = len(ids) - 1
    loss = total / predicted
    first = len(tokenizer.decode_bytes(ids[:1].tolist()))
    size = len(tokenizer.decode_bytes(ids.tolist())) - first
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / size,
        "tokens": predicted,
    }


@torch.no_grad()
def last_word_accuracy(model, tokenizer, lines, *, progress=False):
    """{accuracy, loss: nats per word, perplexity: per word, lines} of the last word of each line that has two words.

    A word is right where each of its tokens is the likeliest after what is before it. Paperno et al. 2016, "The LAMBADA
    dataset"; the line is cut on the left to what the model has positions for. Raises ValueError without such a line.
    """
    right, total, count = 0, 0.0, 0
    for line in tqdm(lines, unit="line", desc="evaluating", disable=None if progress else True):
        context, space, word = line.strip().rpartition(" ")
        if not (context.strip() and word):
            continue
        target = tokenizer.encode_ordinary(space + word)
        ids = [*tokenizer.encode_ordinary(context.rstrip()), *target][-model.config.n_positions :]
        if len(target) >= len(ids):
            raise ValueError(
                f"last_word_accuracy: the last word of {line[:40]!r} alone fills all positions of the model"
            )
        ids = torch.tensor(ids, device=model.device)
        logits = model(ids[None], use_cache=False, logits_to_keep=len(target) + 1).logits[0, :-1].float()
        wanted = ids[-len(target) :]
        right += bool((logits.argmax(-1) == wanted).all())
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += 1
    if not count:
        raise ValueError("last_word_accuracy: no line has two words")
    loss = total / count
    return {
        "accuracy": right / count,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "lines": count,
    }


if __name__ == "__main__":
    sys.exit(main())
