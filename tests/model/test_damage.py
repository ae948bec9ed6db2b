"""A checkpoint is read whole and as it is, or refused with one ValueError that names the file and the tensor."""

import json
import random
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole import load_mark, marked

from model import GPT2, GPT2Config
from model.checkpoints.saving import WEIGHTS_KEY

MARK = 3
LN = "transformer.h.1.ln_1.weight"
BIN = "pytorch_model.bin"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{kind: directory}; never changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    marked(MARK).save_pretrained(root / "safetensors")
    marked(MARK).save_pretrained(root / "sharded", max_shard_size="3KB")
    for kind in ("zip", "legacy"):
        (root / kind).mkdir()
        shutil.copy(root / "safetensors" / "config.json", root / kind)
        torch.save(marked(MARK).state_dict(), root / kind / BIN, _use_new_zipfile_serialization=kind == "zip")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def directory(checkpoints, tmp_path):
    """A copy of a pickled checkpoint."""
    shutil.copytree(checkpoints["zip"], tmp_path / "copy")
    return tmp_path / "copy"


def pickled(directory, content):
    torch.save(content, directory / BIN)
    return directory


def load_or_refuse(directory, path):
    """Whether the checkpoint loads; where it does not, the error is the one that is promised."""
    try:
        GPT2.from_pretrained(directory)
    except (ValueError, FileNotFoundError) as caught:
        error = caught
    else:
        return True
    if isinstance(error, FileNotFoundError):  # of a shard, whose name in the index was hit
        assert path.suffix == ".json", error
    else:
        assert path.name in str(error), error
    return False


FILES = [
    ("zip", BIN),
    ("legacy", BIN),
    ("safetensors", "model.safetensors"),
    ("sharded", "model.safetensors.index.json"),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_damage_anywhere_is_one_error_that_names_the_file(kind, name, checkpoints, tmp_path):
    shutil.copytree(checkpoints[kind], tmp_path / "copy")
    path = tmp_path / "copy" / name
    whole, dice = path.read_bytes(), random.Random(0)
    for length in [0, 1, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:length])
        assert not load_or_refuse(tmp_path / "copy", path) or whole[length:].isspace(), f"cut to {length} bytes"
    for _ in range(60):  # a flip in a number's own bytes is another number, and loads
        place = dice.randrange(len(whole) if kind == "sharded" else 2000)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
        load_or_refuse(tmp_path / "copy", path)


def test_a_compressed_zip_is_read_as_the_numbers_it_holds(directory):
    path = directory / BIN
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert load_mark(directory) == MARK


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list; it must be a dict of tensors"),
        (torch.ones(3), "holds Tensor; it must be a dict of tensors"),
        (None, "holds NoneType"),
        ({LN: 3.0}, f"'{LN}' is float; it must be a dense tensor"),
        ({LN: [torch.ones(8)]}, f"'{LN}' is list; it must be a dense tensor"),
        ({LN: None}, f"'{LN}' is NoneType"),
        ({3: torch.ones(8)}, "3 is no name"),
        ({LN: torch.ones(8).to_sparse()}, f"'{LN}' is of layout torch.sparse_coo"),
        ({LN: torch.ones(8, device="meta")}, f"'{LN}' is a tensor without values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickles_of_other_things_are_refused(content, message, directory):
    if isinstance(content, dict):
        content = {**marked(MARK).state_dict(), **content}
    with pytest.raises(ValueError, match=rf"{re.escape(BIN)}:? .*{re.escape(message)}"):
        GPT2.from_pretrained(pickled(directory, content))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floats_are_refused_not_cast(dtype, directory):
    tensors = {**marked(MARK).state_dict(), LN: torch.full((8,), 3).to(dtype)}
    with pytest.raises(ValueError, match=rf"{re.escape(LN)} is {dtype}; weights must be floating-point"):
        GPT2.from_pretrained(pickled(directory, tensors))


def test_tensors_that_share_memory_become_parameters_of_their_own(directory):
    tensors = marked(MARK).state_dict()
    one = torch.full((8,), float(MARK))
    tensors[LN] = tensors["transformer.h.1.ln_2.weight"] = one
    tensors["transformer.h.0.ln_1.weight"] = torch.tensor([float(MARK)]).expand(8)
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.full((32, 8), float(MARK)).t()
    model = GPT2.from_pretrained(pickled(directory, tensors))
    assert load_mark(directory) == MARK
    block = model.transformer.h[1]
    with torch.no_grad():
        block.ln_1.weight.zero_()
        model.transformer.h[0].ln_1.weight[0] = 7
    assert block.ln_2.weight.tolist() == [MARK] * 8
    assert model.transformer.h[0].ln_1.weight.tolist() == [7] + [MARK] * 7
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_name_that_stands_twice_is_refused(directory):
    tensors = {**marked(MARK).state_dict(), LN.removeprefix("transformer."): torch.zeros(8)}
    with pytest.raises(ValueError, match=rf"holds {re.escape(LN)} twice"):
        GPT2.from_pretrained(pickled(directory, tensors))


def test_a_model_that_diverged_can_be_loaded_and_looked_at(directory):
    model = marked(MARK)
    with torch.no_grad():
        model.transformer.wte.weight[1, 1] = float("nan")
    again = GPT2.from_pretrained(
        pickled(directory, model.state_dict())
    )  # both names of the tied tensor are in the file
    assert again.transformer.wte.weight.isnan().sum() == 1


@pytest.fixture
def sharded(checkpoints, tmp_path):
    shutil.copytree(checkpoints["sharded"], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_shard_holds_what_its_index_says_and_nothing_else(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    ours, others = load_file(first), load_file(second)
    key = next(iter(others))
    save_file({**ours, key: torch.zeros_like(others[key])}, first)
    with pytest.raises(ValueError, match=rf"shard {first.name} holds {re.escape(key)}, which .* does not place there"):
        GPT2.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not JSON"),
        ('{"weight_map": ' * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "holds list; it must be an object"),
        ("{}", "it must have a weight_map of keys to files"),
        ('{"weight_map": {}}', "it must have a weight_map of keys to files"),
        ('{"weight_map": ["a"]}', "it must have a weight_map of keys to files"),
        ('{"weight_map": {"a": 1}}', "it must have a weight_map of keys to files"),
        ('{"weight_map": {"a": null}}', "it must have a weight_map of keys to files"),
        ('{"weight_map": {"a": ""}}', "it must be a .safetensors or .bin file"),
        ('{"weight_map": {"a": ".."}}', "it must be a .safetensors or .bin file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "it must be a .safetensors or .bin file"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "it must be a .safetensors or .bin file"),
        ('{"weight_map": {"a": "config.json"}}', "names 'config.json'; it must be a .safetensors or .bin file"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_damaged_indexes_are_refused(index, message, sharded):
    (sharded / "model.safetensors.index.json").write_bytes(index.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"from_pretrained: .*{re.escape(message)}"):
        GPT2.from_pretrained(sharded)


@pytest.mark.parametrize(
    "named",
    ["../model.safetensors", "/model.safetensors", "config.json", 3, "", ["x"], True, "a\0.safetensors"],
    ids=repr,
)
def test_config_json_names_weights_beside_it_or_none(named, checkpoints, tmp_path):
    shutil.copytree(checkpoints["safetensors"], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), WEIGHTS_KEY: named}))
    with pytest.raises(ValueError, match=r"config\.json .*(must be the name of a safetensors file|must lie beside it)"):
        GPT2.from_pretrained(tmp_path / "copy")


def test_a_deep_config_is_refused(directory):
    (directory / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        GPT2.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        GPT2Config.from_pretrained(directory)
