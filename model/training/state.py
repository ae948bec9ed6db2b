"""What training needs to go on as if it had not been stopped: whole, or not there.

step-00000100.pt, one file, of a run whose processes hold all weights. step-00000100/, of one that is split among them:
each writes what it holds, by torch.distributed.checkpoint, as safetensors; any number of processes reads it. No code is
run from either.
"""

import io
import os
import re
import shutil
import warnings

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from model.checkpoints.atomic import TEMPORARY, flush_directory, unused_name, write_file, write_new_file

FOLDER, REST = "training", "rest.pt"
_NAME = re.compile(r"step-(\d{8})(\.pt)?")
_WHOLE = {"step", "best", "model", "optimizer", "scaler", "random"}
_SPLIT = {"step", "best", "scaler", "random", "updates", "files"}


def saved_steps(directory):
    """The steps at which states were saved, and their paths, the newest last."""
    found = [(int(match[1]), path) for path in _inside(directory) if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_state(directory, step, state, keep):
    """Writes the state after `step` steps, then removes all but the newest `keep`."""
    folder = _folder(directory)
    content = io.BytesIO()
    torch.save(state, content)
    write_file(folder / f"step-{step:08d}.pt", content.getvalue())
    _forget(directory, keep)


def load_state(path):
    """A saved file, on the CPU. Raises ValueError, with the path, where it is damaged; runs no code from it."""
    return _read(path, _WHOLE)


def save_split(directory, step, model, optimizer, state, keep, processes):
    """As save_state, of weights and moments that are split among processes, all of which call it."""
    if processes.is_first:
        _folder(directory)
    path = directory / FOLDER / f"step-{step:08d}"
    temporary = path.with_name(processes.gather(f".{path.name}.{unused_name()}.tmp")[0])
    tensors, updates = _tensors(model, optimizer)
    try:
        save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=processes.hosts,
        )
    except CheckpointException as error:  # no Exception, for torch
        raise OSError(f"{path} cannot be written: {_first(error)}") from None
    if processes.is_first:
        content = io.BytesIO()
        torch.save({**state, "updates": float(updates), "files": _sizes(temporary)}, content)
        write_new_file(temporary / REST, [content.getvalue()])
        flush_directory(temporary)
        _remove(path)  # of an earlier run of this step
        os.replace(temporary, path)
        flush_directory(path.parent)
        _forget(directory, keep)


def load_split(path, model, optimizer, processes):
    """Fills weights and moments from a directory; the rest of the state. Raises ValueError as load_state does."""
    rest = _read(path / REST, _SPLIT)
    for name, size in rest["files"].items():
        if (found := _sizes(path).get(name)) != size:
            raise ValueError(
                f"{path / name} has {found or 0} bytes of {size}: the state of step {rest['step']} is damaged"
            )
    get_optimizer_state_dict(model, optimizer)  # makes the moments
    tensors, _ = _tensors(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what was asked for
            load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=processes.hosts,
                no_dist=processes.size == 1,
            )
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {_first(error)}") from None
    for moments in optimizer.state.values():
        moments["step"].fill_(rest["updates"])
    return rest


def _tensors(model, optimizer):
    """({name: tensor} of weights and moments, the number of updates)."""
    tensors, updates = {}, 0
    for name, weight in model.named_parameters():  # a tied one once
        tensors[name] = weight
        for moment, value in optimizer.state[weight].items():
            if moment == "step":
                updates = value
            else:
                tensors[f"{name}.{moment}"] = value
    return tensors, updates


def _folder(directory):
    """The folder of the states, made if need be, without what a killed process has left."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.iterdir():
        if TEMPORARY.fullmatch(stray.name):
            _remove(stray)
    return folder


def _forget(directory, keep):
    for _, path in saved_steps(directory)[:-keep]:
        _remove(path)


def _remove(path):
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.{unused_name()}.tmp")  # half of a state must not look like one
        shutil.rmtree(path.rename(hidden))
    else:
        path.unlink(missing_ok=True)


def _inside(directory):
    folder = directory / FOLDER
    return list(folder.iterdir()) if folder.is_dir() else []


def _sizes(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir() if path.name != REST}


def _first(error):
    """What happened, in words, of a CheckpointException: the error of the first rank that has one."""
    cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"


def _read(path, names):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = names - state.keys()
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
        return state
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def random_state(device):
    """The states of torch's generators, of the CPU and of a GPU."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
