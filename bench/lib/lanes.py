"""Where kernels of each dtype run on a machine without a GPU, and how a bench gets its rows from there."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Where kernels of each dtype run without a GPU. The interpreter gets bf16 products wrong.
LANES = {"float32": "interpret", "float16": "interpret", "bfloat16": "simulate sm_80"}


def rows_by_lane(rows_in_lane, cases, *arguments):
    """The rows of rows_in_lane(lane, cases, *arguments) for the cases of each lane, called in that lane's process."""
    rows = []
    for lane in dict.fromkeys(LANES[case.dtype] for case in cases):
        mine = [case for case in cases if LANES[case.dtype] == lane]
        rows += in_process_of_lane(lane, rows_in_lane, lane, mine, *arguments)
    return rows


def in_process_of_lane(lane, function, *arguments):
    """function(*arguments) in a process where kernels run in that lane: "interpret", or another.

    It is a process of its own, since Triton chooses its interpreter when kernels are imported.
    """
    interpreted = {"TRITON_INTERPRET": "1" if lane == "interpret" else "0"}
    with mock.patch.dict(os.environ, interpreted), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
