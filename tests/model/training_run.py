"""A tiny training run as a program, for tests that kill it or start several: python training_run.py DATA OUT [options].

A JSON object of Settings, and of `dropout`, `shard`, `resume` and `die_at`, the step after which the last of the
processes is killed.
"""

import json
import os
import signal
import sys

import torch

from model import GPT2, GPT2Config
from model.training.loop import Settings, Training
from model.training.processes import Processes

CONFIG = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 97}
CONFIG |= {"bos_token_id": 0, "eos_token_id": 0}
SETTINGS = {"batch": 4, "seq_len": 16, "steps": 8, "lr": 3e-3, "warmup": 2, "save_every": 3, "eval_every": 4}


def build(dropout=0.0, seed=0, **config):
    torch.manual_seed(seed)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    return GPT2(GPT2Config(**{**CONFIG, **rates, **config}))


def start(data, out, resume=False, dropout=0.0, model=None, shard=False, tensor=False, **settings):
    settings, model = Settings(**{**SETTINGS, **settings}), model or build(dropout)
    processes = Processes(model.device, shard, tensor)
    return Training(model, data, out, settings, processes=processes, resume=resume, show=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    die_at = options.pop("die_at", None)
    run = start(sys.argv[1], sys.argv[2], **options)
    step = run.take_step

    def take_step():
        row = step()
        if run.step == die_at and run.processes.rank == run.processes.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    run.take_step = take_step
    run.train()
    run.processes.close()
