"""What training needs to go on as if it had not been stopped, in one file that is whole or not there."""

import io
import re

import torch

from model.checkpoints.atomic import TEMPORARY, write_file

FOLDER = "training"
_NAME = re.compile(r"step-(\d{8})\.pt")


def saved_steps(directory):
    """The steps at which states were saved, and their paths, the newest last."""
    found = [
        (int(match[1]), path) for path in (directory / FOLDER).glob("*.pt") if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found)


def save_state(directory, step, state, keep):
    """Writes the state after `step` steps, then removes all but the newest `keep`."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.iterdir():
        if TEMPORARY.fullmatch(stray.name):
            stray.unlink()
    content = io.BytesIO()
    torch.save(state, content)
    write_file(folder / f"step-{step:08d}.pt", content.getvalue())
    for _, path in saved_steps(directory)[:-keep]:
        path.unlink()


def load_state(path):
    """A saved state, on the CPU. Raises ValueError, with the path, where the file is damaged; runs no code from it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "best", "model", "optimizer", "scaler", "random"} - state.keys()
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
