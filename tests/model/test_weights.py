"""Checkpoints interchange with transformers, from directories and the Hub's cache; a damaged one is refused."""

import json
import re

import pytest
import torch
from optional import transformers
from peers import pair, spread, tiny_config
from safetensors.torch import load_file, save_file

from model import GPT2, GPT2Config, GPT2Model

IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def ours():
    return spread(GPT2(tiny_config())).eval()


@pytest.fixture
def saved(ours, tmp_path):
    """The directory of a saved model."""
    ours.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(directory, change, filename="model.safetensors"):
    """Replaces a checkpoint's tensors by change(tensors)."""
    tensors = {key: tensor.clone() for key, tensor in load_file(directory / filename).items()}
    save_file(change(tensors), directory / filename, metadata={"format": "pt"})


def files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", [None, "40KB"], ids=["one-file", "sharded"])
def test_what_we_save_transformers_loads(tied, shard, tmp_path):
    ours, _ = pair(tiny_config(tie_word_embeddings=tied))
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == tied
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), rtol=0, atol=2e-4)
    assert theirs.config.architectures == ["GPT2LMHeadModel"]
    again = GPT2.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again), logits(ours))
    assert again.config == ours.config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one-file", "sharded"])
def test_what_transformers_saves_we_load(tied, shard, tmp_path):
    _, theirs = pair(tiny_config(tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert ("model.safetensors" in files(tmp_path)) == (shard == "1GB")
    ours = GPT2.from_pretrained(tmp_path, attn_implementation="eager")
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-4)


def test_saved_names_and_shapes_are_hugging_faces(saved):
    tensors = load_file(saved / "model.safetensors")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny_config().to_dict())).state_dict()
    assert tensors.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(tensors[key].shape == theirs[key].shape for key in tensors)
    assert files(saved) == ["config.json", "model.safetensors"]


def test_a_base_checkpoint_serves_the_language_model_and_the_other_way(ours, saved, tmp_path):
    base = GPT2Model.from_pretrained(saved)
    base.save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path / "base")), logits(ours))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-4)


def test_a_checkpoint_of_2019_loads(ours, saved):
    """OpenAI's weights as first published: no prefix, no lm_head, each layer's causal mask stored."""

    def age(tensors):
        old = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        for i in range(3):
            old[f"h.{i}.attn.bias"] = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
            old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return old

    rewrite(saved, age)
    assert torch.equal(logits(GPT2.from_pretrained(saved)), logits(ours))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy-pickle"])
def test_pickled_weights_load(legacy, ours, saved):
    (saved / "model.safetensors").unlink()
    torch.save(ours.state_dict(), saved / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(logits(GPT2.from_pretrained(saved)), logits(ours))


def test_a_pickle_that_runs_code_is_refused(saved, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (saved / "model.safetensors").unlink()
    torch.save({"wte.weight": Payload()}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or holds more than tensors; not loaded"):
        GPT2.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_dtype_is_the_configs_or_the_files_or_the_callers(ours, saved):
    assert GPT2.from_pretrained(saved).dtype == torch.float32
    assert GPT2.from_pretrained(saved, dtype=torch.float16).dtype == torch.float16
    assert GPT2.from_pretrained(saved, torch_dtype="bfloat16").config.dtype == torch.bfloat16
    ours.bfloat16().save_pretrained(saved)
    assert GPT2.from_pretrained(saved).dtype == torch.bfloat16
    assert transformers.GPT2LMHeadModel.from_pretrained(saved).dtype == torch.bfloat16
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert GPT2.from_pretrained(saved).dtype == torch.bfloat16


def test_arguments_reach_the_model_and_the_config(saved):
    model = GPT2.from_pretrained(saved, attn_implementation="eager", attn_pdrop=0.5, output_hidden_states=True)
    assert model.transformer.attn_implementation == "eager"
    assert model.transformer.h[2].attn.attn_dropout.p == 0.5
    assert len(model(IDS).hidden_states) == 4
    with pytest.raises(TypeError, match="unexpected argument 'device_map'"):
        GPT2.from_pretrained(saved, device_map="auto")
    with pytest.raises(ValueError, match="dtype is 'float7'; it must be a floating-point"):
        GPT2.from_pretrained(saved, dtype="float7")
    with pytest.raises(ValueError, match="attn_implementation='fast' is unknown"):
        GPT2.from_pretrained(saved, attn_implementation="fast")


def test_loading_draws_no_random_number_and_maps_the_file(saved):
    before = torch.get_rng_state()
    model = GPT2.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    last = max(model.parameters(), key=lambda parameter: parameter.data_ptr())
    # The parameters lie beside each other as they do in the file: they view one mapping of it.
    assert max(addresses) + last.nbytes - min(addresses) <= (saved / "model.safetensors").stat().st_size


def test_training_a_loaded_model_leaves_its_file_alone(ours, saved):
    model = GPT2.from_pretrained(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(GPT2.from_pretrained(saved)), logits(ours))
    model.save_pretrained(saved)  # over the file that it is mapped from
    assert not logits(GPT2.from_pretrained(saved)).any()


def test_a_save_replaces_what_an_earlier_one_left(ours, saved):
    first = logits(ours)
    ours.save_pretrained(saved, max_shard_size="40KB")
    assert "model.safetensors" not in files(saved)
    assert "model.safetensors.index.json" in files(saved)
    assert torch.equal(logits(GPT2.from_pretrained(saved)), first)
    spread(ours).save_pretrained(saved)
    assert files(saved) == ["config.json", "model.safetensors"]
    assert not torch.equal(logits(GPT2.from_pretrained(saved)), first)


class TestHub:
    """A cache directory as huggingface_hub lays it out, and no network."""

    COMMIT = "0123456789012345678901234567890123456789"

    @pytest.fixture
    def cache(self, saved, tmp_path):
        repository = tmp_path / "cache" / "models--someone--tiny-gpt2"
        snapshot = repository / "snapshots" / self.COMMIT
        snapshot.parent.mkdir(parents=True)
        saved.rename(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(self.COMMIT)
        (repository / "refs" / "v1").write_text(self.COMMIT)
        return tmp_path / "cache"

    def test_loads_by_name(self, ours, cache):
        for revision in (None, "v1", self.COMMIT):
            model = GPT2.from_pretrained(
                "someone/tiny-gpt2", cache_dir=cache, local_files_only=True, revision=revision, token=False
            )
            assert torch.equal(logits(model), logits(ours))
        assert GPT2Config.from_pretrained("someone/tiny-gpt2", cache_dir=cache, local_files_only=True) == model.config

    def test_offline_mode_is_heeded(self, ours, cache, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert torch.equal(logits(GPT2.from_pretrained("someone/tiny-gpt2", cache_dir=cache)), logits(ours))
        with pytest.raises(
            FileNotFoundError, match=r"'someone/other' \(or, offline, its cache\) holds no config\.json"
        ):
            GPT2.from_pretrained("someone/other", cache_dir=cache)

    def test_shards_and_pickles_are_found_in_the_cache(self, ours, cache):
        snapshot = next(cache.glob("*/snapshots/*"))
        ours.save_pretrained(snapshot, max_shard_size="40KB")
        options = {"cache_dir": cache, "local_files_only": True}
        assert torch.equal(logits(GPT2.from_pretrained("someone/tiny-gpt2", **options)), logits(ours))
        for path in snapshot.glob("model*"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, .*pytorch_model\.bin"):
            GPT2.from_pretrained("someone/tiny-gpt2", **options)
        torch.save(ours.state_dict(), snapshot / "pytorch_model.bin")
        assert torch.equal(logits(GPT2.from_pretrained("someone/tiny-gpt2", **options)), logits(ours))

    def test_what_is_no_name_is_refused(self):
        with pytest.raises(FileNotFoundError, match=r"'no/such/dir' is neither a directory nor a repository"):
            GPT2.from_pretrained("no/such/dir", local_files_only=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_missing_files_are_named(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"directory .*saved holds none of model\.safetensors"):
        GPT2.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"directory .*saved holds no config\.json"):
        GPT2.from_pretrained(saved)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy-pickle", "empty"])
def test_truncated_files_are_refused(kind, ours, saved):
    path = saved / "model.safetensors"
    if kind in ("zip", "legacy-pickle"):
        path.unlink()
        path = saved / "pytorch_model.bin"
        torch.save(ours.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "empty":
        path.write_bytes(b"")
    truncate(path)
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is (truncated or )?damaged"):
        GPT2.from_pretrained(saved)


def test_damaged_shards_are_refused(ours, saved):
    ours.save_pretrained(saved, max_shard_size="40KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    shards[1].rename(saved / "kept")
    with pytest.raises(FileNotFoundError, match=f"holds no {shards[1].name}"):
        GPT2.from_pretrained(saved)
    (saved / "kept").rename(shards[1])
    rewrite(saved, lambda tensors: dict(list(tensors.items())[1:]), shards[1].name)
    with pytest.raises(ValueError, match=f"shard {shards[1].name} lacks .*, which .*index.json promises"):
        GPT2.from_pretrained(saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"names .../model\.safetensors.; a weights file must lie beside it"):
        GPT2.from_pretrained(saved)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        GPT2.from_pretrained(saved)


LN = "transformer.h.1.ln_1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != LN}, f"GPT2.*the checkpoint lacks {LN}"),
        (lambda t: {**t, "transformer.h.3.ln_1.weight": t[LN].clone()}, "has also transformer.h.3.ln_1.weight"),
        (lambda t: {**t, LN: torch.ones(47)}, rf"wrong shapes: {LN} \(47,\), the config asks for \(48,\)"),
        (lambda t: {**t, "lm_head.weight": torch.ones(101, 48)}, r"lm_head\.weight differs from wte\.weight"),
    ],
    ids=["missing", "unexpected", "mis-shaped", "tied-and-different"],
)
def test_wrong_tensors_are_refused(change, message, saved):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(saved)


def test_what_a_refusal_suggests_works(ours, saved):
    rewrite(saved, lambda t: {**t, "odd": torch.ones(1), "lm_head.weight": 2 * t["transformer.wte.weight"]})
    model = GPT2.from_pretrained(saved, strict=False, tie_word_embeddings=False)
    torch.testing.assert_close(logits(model), 2 * logits(ours))


def test_an_untied_model_needs_its_head(saved):
    with pytest.raises(ValueError, match=r"the checkpoint lacks lm_head\.weight"):
        GPT2.from_pretrained(saved, tie_word_embeddings=False)


class TestTying:
    """What is saved is what the tensors are: the config's flag may no longer say it."""

    def check(self, model, directory, *, is_tied):
        """Saves, and loads with both libraries: the same logits."""
        expected = logits(model)
        model.save_pretrained(directory)
        assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] == is_tied
        assert ("lm_head.weight" in load_file(directory / "model.safetensors")) != is_tied
        again = GPT2.from_pretrained(directory)
        assert (again.lm_head.weight is again.transformer.wte.weight) == is_tied
        assert torch.equal(logits(again), expected)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(directory)
        torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-4)

    def test_a_head_untied_since_is_saved(self, ours, tmp_path, caplog):
        """Regression: it was left out, and the reloaded logits were 27 off."""
        ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach() * 2)
        self.check(ours, tmp_path, is_tied=False)
        assert "config.tie_word_embeddings is True, but lm_head.weight is a tensor of its own" in caplog.text

    def test_a_head_tied_since_is_saved_once(self, tmp_path, caplog):
        """Regression: safetensors' own error about shared memory."""
        model = spread(GPT2(tiny_config(tie_word_embeddings=False), attn_implementation="sdpa")).eval()
        model.lm_head.weight = model.transformer.wte.weight
        self.check(model, tmp_path, is_tied=True)
        assert "config.tie_word_embeddings is False, but lm_head.weight is wte.weight" in caplog.text

    def test_the_flag_alone_changes_nothing(self, ours, tmp_path):
        ours.config.tie_word_embeddings = False
        self.check(ours, tmp_path, is_tied=True)

    def test_a_way_through_meta_leaves_the_head_tied(self, ours, tmp_path):
        """Regression: to_empty() made two parameters of one."""
        with torch.device("meta"):
            model = GPT2(tiny_config(), attn_implementation="sdpa").eval()
        model.to_empty(device="cpu").load_state_dict(ours.state_dict())
        assert model.lm_head.weight is model.transformer.wte.weight
        model.train()(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(model.parameters(), 1.0).step()
        self.check(model.eval(), tmp_path, is_tied=True)

    def test_tensors_assigned_apart_are_saved_apart(self, ours, tmp_path):
        state = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
        ours.load_state_dict(state, assign=True)
        ours.lm_head.weight.data.mul_(2)
        self.check(ours, tmp_path, is_tied=False)

    def test_layers_that_share_are_written_twice(self, ours, tmp_path):
        ours.transformer.h[1].mlp = ours.transformer.h[0].mlp
        self.check(ours, tmp_path, is_tied=True)

    @pytest.mark.parametrize("cls", [GPT2, GPT2Model])
    def test_one_name_of_the_two_is_enough(self, cls, ours, saved):
        rewrite(saved, lambda t: {"lm_head.weight": t.pop("transformer.wte.weight"), **t})
        model = cls.from_pretrained(saved)
        assert torch.equal(model.get_input_embeddings().weight, ours.transformer.wte.weight)

    def test_weights_without_values_are_not_saved(self, ours, tmp_path):
        with pytest.raises(ValueError, match='weights are on device "meta"; they hold no values'):
            ours.to("meta").save_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_recognised(prefix, ours, saved):
    rewrite(saved, lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()})
    assert torch.equal(logits(GPT2.from_pretrained(saved)), logits(ours))


def test_a_prefix_before_some_keys_alone_is_refused(saved):
    rewrite(saved, lambda t: {"module." + key if key == LN else key: tensor for key, tensor in t.items()})
    with pytest.raises(ValueError, match=f"the checkpoint lacks {LN}"):
        GPT2.from_pretrained(saved)


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict"])
def test_the_state_dict_of_a_training_scripts_checkpoint_is_found(name, ours, saved):
    (saved / "model.safetensors").unlink()
    torch.save({name: ours.state_dict(), "optimizer": {"step": 3}, "epoch": 1}, saved / "pytorch_model.bin")
    assert torch.equal(logits(GPT2.from_pretrained(saved)), logits(ours))
