"""TensorFlow's checkpoints of the Hub, tf_model.h5, by the package h5py; biases are [1, out], the rest as here."""

import re

import torch

from model.checkpoints.files import listed, read_json_object
from model.config import GPT2Config
from model.formats.found import Found, names

FILE = "tf_model.h5"
_LAST = {"gamma": "weight", "beta": "bias", "embeddings": "weight"}
_TENSOR = re.compile(r"(?:.*/)?(?P<path>(?:h_\._\d+/|wte|wpe|ln_f).*?)/(?P<last>\w+):0")


def is_h5(directory):
    return directory.is_dir() and (directory / FILE).is_file()


def our_name(theirs):
    """Our name of a dataset of transformers' TFGPT2 models, or None for another model's."""
    match = _TENSOR.fullmatch(theirs)
    if match is None:
        return None
    path = match["path"].replace("h_._", "h.").replace("/", ".")
    return f"transformer.{path}.{_LAST.get(match['last'], match['last'])}"


def read(directory):
    """The Found of a directory with a tf_model.h5 and a config.json; each tensor is read once, into memory."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"convert: {directory / FILE} is read by the package h5py: pip install h5py") from error
    config = GPT2Config.from_dict(read_json_object(directory / "config.json"))
    path, found = directory / FILE, Found(config, {})
    wanted, unknown = set(names(config)), []

    def visit(theirs, node):
        if not hasattr(node, "shape"):
            return
        name = our_name(theirs)
        if name not in wanted or name in found.tensors:
            unknown.append(theirs)
            return
        tensor = torch.from_numpy(node[()])
        is_bias = name.endswith(".bias") and tensor.dim() == 2 and tensor.shape[0] == 1
        found.tensors[name], found.renamed[name] = tensor[0] if is_bias else tensor, theirs

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # what h5py raises of damaged files
        raise ValueError(f"convert: {path} is truncated or damaged: {error}") from error
    if unknown:
        raise ValueError(f"convert: {path} has also {listed(unknown)}, which this GPT-2 has not")
    return found
