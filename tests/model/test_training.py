"""Training: the same losses as transformers', the same bits after a kill, the same step however it is cut up."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lanes import across_lanes
from optional import transformers
from peers import their_config
from torch.profiler import ProfilerActivity, profile
from training_run import SETTINGS, build, start

from model import GPT2
from model.training.data import Batches, Tokens
from model.training.log import read_log
from model.training.loop import Settings
from model.training.optimizer import adamw, clip_gradients, flops_per_token, learning_rate
from model.training.tensor_parallel import split_by_heads
from tokenizer.shards import write_shard

RUN = Path(__file__).with_name("training_run.py")
ROOT = RUN.parents[2]


def text(number, seed):
    """Ids that can be learned: each mostly follows from the one before."""
    generator = np.random.default_rng(seed)
    ids = [int(generator.integers(97))]
    for jump in generator.random(number - 1):
        ids.append((ids[-1] * 7 + 3) % 97 if jump < 0.8 else int(generator.integers(97)))
    return ids


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for i, number in enumerate((700, 20, 900)):
        write_shard(path / f"train-{i:06d}.bin", text(number, i), [0])
    write_shard(path / "val-000000.bin", text(400, 9), [0])
    return path


def rows(out, name="loss"):
    return [row[name] for row in read_log(out / "log.jsonl") if name in row]


class TestBatches:
    @pytest.fixture
    def tokens(self, data):
        return Tokens(data, "train", 16)

    def batches(self, tokens, **options):
        return Batches(tokens, 3, **{"seed": 1, "vocab_size": 97, **options})

    @pytest.mark.parametrize("once", [False, True])
    def test_a_batch_depends_on_its_number_alone(self, tokens, once):
        first, second = (self.batches(tokens, once=once) for _ in range(2))
        forwards = [first.batch(i, i + 1) for i in range(60)]
        backwards = [second.batch(i) for i in reversed(range(60))][::-1]
        assert all(map(torch.equal, forwards, backwards))
        other = self.batches(tokens, once=once, seed=2)
        assert not torch.equal(other.batch(0), forwards[0])

    def test_an_epoch_has_each_window_once(self, tokens):
        cells = tokens.cells
        assert cells == 700 // 16 + 20 // 16 + 900 // 16
        batches = Batches(tokens, 10, seed=3, vocab_size=97, once=True)
        seen = torch.cat([batches.batch(i) for i in range(cells)])  # ten epochs
        expected = sorted(tokens.cell(i).tolist() for i in range(cells))
        epochs = seen.view(10, cells, 16).tolist()
        assert all(sorted(epoch) == expected for epoch in epochs)
        assert epochs[0] != epochs[1]

    def test_windows_begin_anywhere_and_stay_within_a_shard(self, tokens):
        whole = [tokens.anywhere(i).tolist() for i in range(tokens.positions)]
        expected = [shard[i : i + 16].tolist() for shard in tokens.shards for i in range(len(shard) - 15)]
        assert whole == expected

    def test_an_id_without_an_embedding_is_named_with_its_shard(self, tokens):
        batches = self.batches(tokens, vocab_size=50)
        with pytest.raises(ValueError, match=r"train-00000\d\.bin holds token \d\d; .* has 0 to 49: it was prepared"):
            batches.batch(0)

    def test_without_shards_there_is_advice(self, tmp_path, data):
        with pytest.raises(FileNotFoundError, match=r"has no train-\*\.bin; python -m tokenizer\.prepare"):
            Tokens(tmp_path, "train", 4)
        with pytest.raises(ValueError, match=r"has 900 tokens; windows of 901 need as many"):
            Tokens(data, "train", 901)


class TestTheOptimizer:
    def test_the_rate_rises_and_falls(self):
        rates = [learning_rate(i, lr=1.0, warmup=4, steps=11, least=0.1) for i in range(11)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert rates[7] == pytest.approx(0.55)
        assert rates[10] == pytest.approx(0.1)
        assert learning_rate(0, lr=1.0, warmup=0, steps=1, least=0.1) == 1.0

    def test_what_decays(self):
        model = build()
        decays, keeps = adamw(model, lr=1e-3).param_groups
        named = {id(p): name for name, p in model.named_parameters()}
        assert {named[id(p)].rpartition(".")[2] for p in decays["params"]} == {"weight"}
        assert all("ln_" in named[id(p)] or named[id(p)].endswith("bias") for p in keeps["params"])
        assert sum(p.numel() for group in (decays, keeps) for p in group["params"]) == model.num_parameters()
        assert (decays["weight_decay"], keeps["weight_decay"]) == (0.1, 0.0)

    @pytest.mark.parametrize("case", ["fused", "fused, below", "fused, scaled", "not fused", "no clipping"])
    def test_gradients_are_clipped_in_the_optimizers_own_pass(self, case):
        """Weights, moments and gradients as after clip_grad_norm_, and no pass over the gradients but the norm's."""
        most = {"fused, below": 1e6, "no clipping": 0.0}.get(case, 0.5)
        ours, theirs = build(), build()
        optimizers = [adamw(model, lr=1e-2) for model in (ours, theirs)]
        if case == "not fused":
            optimizers = [torch.optim.AdamW(model.parameters(), fused=False) for model in (ours, theirs)]
        for seed in range(3):
            for model in (ours, theirs):
                torch.manual_seed(seed)
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                norm = clip_gradients(ours.parameters(), optimizers[0], most, scaled="scaled" in case)
            names = [event.key for event in recorded.key_averages()]
            assert ("aten::_foreach_mul_" in names) == (case in ("fused, scaled", "not fused")), names
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most or math.inf)
            assert torch.equal(norm, expected)
            for optimizer in optimizers:
                optimizer.step()
            for a, b in zip(ours.parameters(), theirs.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0.0)

    def test_the_flops_of_gpt2(self):
        """llm.c and nanoGPT count 124M parameters without positions: 6 x 123.7e6 + 12 x 12 x 768 x 1024."""
        with torch.device("meta"):
            model = build(n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50257)
        assert flops_per_token(model, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_the_losses_are_transformers(data, tmp_path):
    """The same weights, data and optimizer, 50 steps in fp32: within 1e-3, all along."""
    run = start(data, tmp_path, steps=50, eval_every=0, save_every=50)
    theirs = transformers.GPT2LMHeadModel(their_config(run.model.config)).train()
    theirs.load_state_dict(run.model.state_dict())
    batches = Batches(run.tokens, 4, seed=0, vocab_size=97)
    optimizer, losses = adamw(theirs, lr=3e-3), []
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr=3e-3, warmup=2, steps=50, least=3e-4)
        ids = batches.batch(step)
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    run.train()
    assert np.abs(np.array(rows(tmp_path)) - losses).max() < 1e-3
    assert losses[-1] < losses[0] - 0.5


def test_micro_batches_are_one_large_batch(data, tmp_path):
    """Of the same tokens: gradients, and so the weights, agree to rounding."""
    large, small = start(data, tmp_path / "a", batch=4), start(data, tmp_path / "b", batch=2, accumulate=2)
    small.batches.batch = lambda number, following=None: large.batches._read(number // 2)[number % 2 * 2 :][:2]
    for _ in range(3):
        a, b = large.take_step(), small.take_step()
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def program(*arguments, launcher=(sys.executable,), **options):
    command = [*launcher, str(RUN), *map(str, arguments), json.dumps(options)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1}, {"once": True, "accumulate": 2}, {"dtype": "pure-bfloat16", "dropout": 0.1}], ids=str
)
def test_a_killed_run_goes_on_with_the_same_bits(options, data, tmp_path):
    """Killed after step 5, of which step 3 was saved: losses and weights are those of a run that nobody stopped."""
    assert program(data, tmp_path / "whole", **options).returncode == 0
    killed = program(data, tmp_path / "killed", die_at=5, **options)
    assert killed.returncode == -signal.SIGKILL
    resumed = program(data, tmp_path / "killed", resume=True, **options)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("loss", "val_loss", "grad_norm", "lr"):
        assert rows(tmp_path / "killed", name) == rows(tmp_path / "whole", name)
    states = [torch.load(tmp_path / name / "training" / "step-00000008.pt") for name in ("whole", "killed")]
    for one, other in zip(*(torch.utils._pytree.tree_leaves(state) for state in states)):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    weights = [GPT2.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TWO = {"steps": 6, "warmup": 0, "accumulate": 2, "eval_every": 3, "keep": 9}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run of one process that takes the micro-batches of two."""
    run = start(data, tmp_path_factory.mktemp("alone"), **{**TWO, "accumulate": 4})
    run.train()
    return run


def until_step_3(directory, copy):
    """A copy of a run as it was after step 3."""
    shutil.copytree(directory, copy)
    for path in (copy / "training").glob("step-00000006*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def same_losses(one, other, abs=2e-5):
    for name in ("loss", "val_loss"):
        assert rows(one, name) == pytest.approx(rows(other, name), abs=abs)
    assert rows(one, "grad_norm") == pytest.approx(rows(other, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_are_one_that_accumulates(shard, data, alone, tmp_path):
    """torchrun with gloo: the losses of one process that takes all micro-batches; it goes on from their state as they
    did themselves."""
    two = program(data, tmp_path / "two", launcher=TORCHRUN, shard=shard, **TWO)
    assert two.returncode == 0, two.stderr
    same_losses(tmp_path / "two", alone.directory)
    for name, tensor in GPT2.from_pretrained(tmp_path / "two").state_dict().items():
        assert torch.allclose(tensor, alone.model.state_dict()[name], atol=2e-4)
    states = sorted(path.name for path in (tmp_path / "two" / "training").iterdir())
    assert states == [f"step-0000000{step}{'' if shard else '.pt'}" for step in (3, 6)]

    out = until_step_3(tmp_path / "two", tmp_path / "again")
    with pytest.raises(ValueError, match="accumulate times the number of processes was 4 and is 2 now"):
        start(data, out, **TWO, resume=True)
    again = start(data, out, **{**TWO, "accumulate": 4}, resume=True)
    assert again.step == 3
    again.train()
    same_losses(out, tmp_path / "two")


@pytest.fixture(scope="module")
def split(data, tmp_path_factory):
    """A run of which one process was killed after step 5."""
    out = tmp_path_factory.mktemp("split") / "run"
    began = time.monotonic()
    dead = program(data, out, launcher=TORCHRUN, shard=True, die_at=5, dtype="pure-bfloat16", **TWO)
    assert dead.returncode != 0
    assert "Signal 9 (SIGKILL)" in dead.stderr
    assert time.monotonic() - began < 120
    return out


class TestAStateThatIsSplit:
    """What two processes, among which the model is split, write and read."""

    @pytest.fixture
    def options(self):
        return {**TWO, "accumulate": 4, "dtype": "pure-bfloat16", "resume": True}

    def test_two_go_on_with_the_same_bits(self, split, data, tmp_path):
        before = rows(split)
        assert len(before) in (4, 5)
        out = until_step_3(split, tmp_path / "out")
        again = program(data, out, launcher=TORCHRUN, shard=True, resume=True, dtype="pure-bfloat16", **TWO)
        assert again.returncode == 0, again.stderr
        assert rows(out)[: len(before)] == before

    def test_one_goes_on(self, split, options, data, tmp_path):
        out = until_step_3(split, tmp_path / "out")
        start(data, out, **options).train()
        assert rows(out)[: len(rows(split))] == pytest.approx(rows(split), abs=2e-3)
        assert all(tensor.dtype is torch.float32 for tensor in GPT2.from_pretrained(out).state_dict().values())

    def test_what_is_damaged_is_named(self, split, options, data, tmp_path):
        out = until_step_3(split, tmp_path / "out")
        state = out / "training" / "step-00000003"
        first = min(state.glob("*.safetensors"))
        content = first.read_bytes()
        for damage in (None, content[:-8], content + b" "):
            first.unlink() if damage is None else first.write_bytes(damage)
            with pytest.raises(ValueError, match=rf"{first.name} has \d+ bytes of {len(content)}: the state of step 3"):
                start(data, out, **options)
        first.write_bytes(b"\xff" * len(content))
        with pytest.raises(ValueError, match="step-00000003 cannot be read"):
            start(data, out, **options)
        first.write_bytes(content)
        (state / "rest.pt").write_bytes(b"")
        with pytest.raises(ValueError, match=r"rest\.pt cannot be read"):
            start(data, out, **options)

    def test_two_go_on_from_what_one_wrote(self, alone, data, tmp_path):
        out = until_step_3(alone.directory, tmp_path / "out")
        assert program(data, out, launcher=TORCHRUN, shard=True, resume=True, **TWO).returncode == 0
        same_losses(out, alone.directory)
        names = sorted(path.name for path in (out / "training").iterdir())
        assert names == ["step-00000003.pt", "step-00000006"]


class TestTensorParallel:
    """Two processes compute each micro-batch together: the losses, norms and weights of one."""

    OPTIONS: ClassVar = {**TWO, "accumulate": 4}

    def test_two_are_one(self, alone, data, tmp_path):
        out = tmp_path / "two"
        two = program(data, out, launcher=TORCHRUN, tensor=True, **self.OPTIONS)
        assert two.returncode == 0, two.stderr
        same_losses(out, alone.directory)
        for path in (out, out / "best"):
            for name, tensor in GPT2.from_pretrained(path).state_dict().items():
                assert torch.allclose(tensor, alone.model.state_dict()[name], atol=2e-4), name
        again = start(data, until_step_3(out, tmp_path / "again"), **self.OPTIONS, resume=True)
        again.train()
        same_losses(tmp_path / "again", alone.directory)

    def test_two_go_on_from_what_one_wrote(self, alone, data, tmp_path):
        out = until_step_3(alone.directory, tmp_path / "out")
        assert program(data, out, launcher=TORCHRUN, tensor=True, resume=True, **self.OPTIONS).returncode == 0
        same_losses(out, alone.directory)
        before, after = (torch.load(path / "training" / "step-00000006.pt") for path in (alone.directory, out))
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (before["optimizer"], after["optimizer"]))):
            if isinstance(one, torch.Tensor):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)

    def test_sixteen_bits(self, data, tmp_path):
        options = {**self.OPTIONS, "dtype": "pure-bfloat16", "steps": 2, "accumulate": 1, "eval_every": 0}
        start(data, tmp_path / "one", **options).train()
        assert program(data, tmp_path / "two", launcher=TORCHRUN, tensor=True, **options).returncode == 0
        assert rows(tmp_path / "two") == pytest.approx(rows(tmp_path / "one"), abs=5e-3)

    @pytest.mark.parametrize(
        ("size", "config", "words"),
        [
            (3, {}, "3 processes split the model; its n_head 2 is no multiple of it"),
            (2, {"n_inner": 33}, "2 processes split the model; its n_inner 33 is no multiple of it"),
            (2, {"attn_pdrop": 0.1}, "a model whose tensors are split has no dropout"),
        ],
        ids=str,
    )
    def test_what_cannot_be_split(self, size, config, words):
        with pytest.raises(ValueError, match=words):
            split_by_heads(build(**config), SimpleNamespace(size=lambda: size))


def test_nothing_is_split_among_one(data, tmp_path):
    for name, option in (("shard", "shard"), ("tensor_parallel", "tensor")):
        with pytest.raises(ValueError, match=f"{name} splits a model among processes; torchrun starts them"):
            start(data, tmp_path, **{option: True})
    with pytest.raises(ValueError, match="shard and tensor_parallel are two ways to split a model"):
        start(data, tmp_path, shard=True, tensor=True)


def test_the_directory_of_a_run(data, tmp_path):
    run = start(data, tmp_path, steps=7, keep=2, save_every=2)
    last = run.train()
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["step-00000006.pt", "step-00000007.pt"]
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert rows(tmp_path, "step") == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert rows(tmp_path)[-1] == last
    model = GPT2.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), run.model.state_dict().values()))
    assert GPT2.from_pretrained(tmp_path / "best").num_parameters() == model.num_parameters()
    assert run.model.training


def test_a_loss_that_is_not_finite_stops_with_where_it_came_from(data, tmp_path):
    run = start(data, tmp_path)
    run.take_step()
    with torch.no_grad():
        run.model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"the loss of step 2 is nan, at .* from .*train-00000\d\.bin.*saved step is 0"
    ):
        run.train()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(number, data, tmp_path):
    run = start(data, tmp_path, steps=50)
    step = run.take_step

    def take_step():
        if run.step == 4:
            signal.raise_signal(number)
        return step()

    run.take_step = take_step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    again = start(data, tmp_path, steps=50, resume=True)
    assert again.step == 5
    assert rows(tmp_path, "step")[-1] == 5


def test_sixteen_bits_train(data, tmp_path):
    """The losses are fp32's to what 16 bits leave; weights and moments are held in fp32."""
    losses = {}
    for dtype in ("float32", "float16", "bfloat16", "pure-bfloat16"):
        start(data, tmp_path / dtype, dtype=dtype, steps=20, eval_every=10, save_every=20, lr=6e-3).train()
        losses[dtype] = np.array(rows(tmp_path / dtype) + rows(tmp_path / dtype, "val_loss"))
        saved = torch.load(tmp_path / dtype / "training" / "step-00000020.pt")
        moments = [state["exp_avg_sq"] for state in saved["optimizer"]["state"].values()]
        assert {tensor.dtype for tensor in (*saved["model"].values(), *moments)} == {torch.float32}
        assert GPT2.from_pretrained(tmp_path / dtype).dtype is torch.float32
    for dtype in ("float16", "bfloat16", "pure-bfloat16"):
        assert np.abs(losses[dtype] - losses["float32"]).max() < 0.01
        assert (losses[dtype] != losses["float32"]).any()
    assert losses["float32"][19] < losses["float32"][0] - 0.5


class TestPureBfloat16:
    @pytest.fixture
    def run(self, data, tmp_path):
        return lambda name="run", **options: start(data, tmp_path / name, **{"dtype": "pure-bfloat16", **options})

    def test_all_that_is_computed_is_bf16_and_no_update_is_lost(self, run):
        """An update of 1e-6 is far below half a unit in the last place of a bf16 weight of 0.02."""
        run, seen = run(lr=1e-6, warmup=0, weight_decay=0.0), set()
        before = [p.detach().clone() for p in run.model.parameters()]
        for block in run.model.transformer.h:
            block.register_forward_hook(lambda block, args, x: seen.add((x.dtype, block.ln_1.weight.dtype)))
        run.take_step()
        run.evaluate()
        assert seen == {(torch.bfloat16, torch.bfloat16)}
        for old, new in zip(before, run.model.parameters()):
            assert new.dtype is torch.float32
            assert not torch.equal(old, new)
            assert (old - new).abs().max() < 2e-6
        assert torch.equal(before[2].bfloat16(), list(run.model.parameters())[2].bfloat16())

    def test_blocks_that_are_recomputed_see_the_same_weights(self, run):
        model = build()
        model.gradient_checkpointing_enable()
        one, other = run("a"), run("b", model=model)
        assert [one.take_step()["loss"] for _ in range(3)] == [other.take_step()["loss"] for _ in range(3)]

    def test_an_error_leaves_the_fp32_weights_in_place(self, run):
        run = run()
        run.run = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run.take_step()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert run.model.lm_head.weight is run.model.transformer.wte.weight


def test_compiled_steps_are_the_others(data, tmp_path):
    losses = []
    for compile in (False, True):
        model, options = build(n_layer=1), {"dtype": "pure-bfloat16", "compile": compile}
        run = start(data, tmp_path / str(compile), model=model, **options)
        losses.append([run.take_step()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    run.save()
    assert GPT2.from_pretrained(tmp_path / "True").config.n_layer == 1


@across_lanes(torch.float32, lanes=("interpret", "sm_90", "gpu"))
def test_the_triton_path_is_the_torch_path(lane, dtype, data, tmp_path):
    losses = []
    for name in ("triton", "torch"):
        model = build(n_layer=1)
        model.set_attn_implementation("triton" if name == "triton" else "eager")
        model.set_kernel_implementation(name)
        run = start(data, tmp_path / name, model=model.to(lane.device), steps=3, batch=2)
        losses.append([run.take_step()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        ({"batch": 2.5}, TypeError, r"batch is 2\.5; it must be an integer"),
        ({"lr": math.nan}, ValueError, "lr is nan; it must be finite, and positive"),
        ({"lr": 0.0}, ValueError, "lr is 0"),
        ({"clip": -1.0}, ValueError, r"clip is -1\.0"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; it must be one of float32"),
        ({"once": "yes"}, TypeError, "once is 'yes'"),
        ({"seq_len": 1}, ValueError, "seq_len is 1; it must be at least 2"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(change, error, words):
    with pytest.raises(error, match=f"training: {words}"):
        Settings(**change)


def test_a_run_is_neither_overwritten_nor_changed_nor_invented(data, tmp_path):
    start(data, tmp_path, steps=2).train()
    with pytest.raises(ValueError, match="has a run already; resume it"):
        start(data, tmp_path)
    for name, change in (("lr", 1.0), ("seed", 3), ("batch", 2)):
        with pytest.raises(ValueError, match=f"{name} was {SETTINGS.get(name, 0)} and is {change} now"):
            start(data, tmp_path, resume=True, **{name: change})
    with pytest.raises(ValueError, match=r"the model's \w+_pdrop was 0\.0 and is 0\.1 now"):
        start(data, tmp_path, resume=True, dropout=0.1)
    with pytest.raises(ValueError, match="2 steps are done; steps is 1"):
        start(data, tmp_path, resume=True, steps=1)
    with pytest.raises(ValueError, match="has no run to resume"):
        start(data, tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="seq_len is 64; the model has n_positions 32"):
        start(data, tmp_path / "new", seq_len=64)
    state = tmp_path / "training" / "step-00000002.pt"
    content = state.read_bytes()
    for damage in (content[:1000], b""):
        state.write_bytes(damage)
        with pytest.raises(ValueError, match=r"step-00000002\.pt cannot be read"):
            start(data, tmp_path, resume=True)
    torch.save({"step": 2}, state)
    with pytest.raises(ValueError, match=r"step-00000002\.pt cannot be read: ValueError: it lacks best"):
        start(data, tmp_path, resume=True)
    state.unlink()
    with pytest.raises(ValueError, match="training holds no state, though weights were saved"):
        start(data, tmp_path, resume=True)
    state.write_bytes(content)
    for record in ("{", "[]", "[" * 100_000):
        (tmp_path / "training.json").write_text(record)
        with pytest.raises(ValueError, match=r"training\.json is damaged"):
            start(data, tmp_path, resume=True)
