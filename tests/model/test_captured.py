"""Training by captured gradients: the steps of ordinary training, resumed and accumulated alike, or a refusal.

Where there is no GPU the step itself, run again, stands in for its CUDA graph: what must hold without one is that
gradients stay at their addresses, and that making the graph leaves no trace.
"""

import numpy as np
import pytest
import torch
from test_graph import Again
from training_run import build, start

from model.training import captured as captured_module
from model.training.captured import CapturedGradients, refusal
from model.training.log import read_log
from tokenizer.shards import write_shard


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(97, size=3000)
    write_shard(path / "train-000000.bin", ids.tolist(), [0])
    return path


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(captured_module, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured_module, "capture", Again)


def losses(out):
    return [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"dtype": "bfloat16"}, {"dtype": "pure-bfloat16"}, {"clip": 0.0}], ids=str
)
def test_the_steps_are_those_of_ordinary_training(data, tmp_path, options):
    runs = []
    for capture in (False, True):
        run = start(data, tmp_path / str(capture), steps=6, eval_every=0, capture=capture, **options)
        run.train()
        runs.append((losses(tmp_path / str(capture)), [p.detach() for p in run.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


@pytest.mark.usefixtures("on_a_cpu")
def test_a_run_goes_on_with_its_bits_by_either(data, tmp_path):
    whole = start(data, tmp_path / "whole")
    expected = [whole.take_step()["loss"] for _ in range(8)]
    for first in (False, True):
        out = tmp_path / str(first)
        run = start(data, out, capture=first)
        found = [run.take_step()["loss"] for _ in range(4)]
        run.save()
        run = start(data, out, capture=not first, resume=True)
        found += [run.take_step()["loss"] for _ in range(4)]
        assert found == expected


@pytest.mark.usefixtures("on_a_cpu")
class TestCapturedGradients:
    @pytest.fixture
    def model(self):
        return build(resid_pdrop=0.5)

    def made(self, model, ids):
        return CapturedGradients(lambda ids: model(ids, labels=ids).loss, model.parameters(), ids)

    def test_making_it_leaves_no_trace(self, model):
        weights, ids = [p.detach().clone() for p in model.parameters()], torch.randint(97, (2, 8))
        state = torch.get_rng_state()
        captured = self.made(model.train(), ids)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, model.parameters(), weights))
        assert not any(gradient.any() for gradient in captured.gradients)

    def test_gradients_add_up_where_they_stand(self, model):
        ids, others = torch.randint(97, (2, 2, 8))
        captured = self.made(model.eval(), ids)
        places = [gradient.data_ptr() for gradient in captured.gradients]
        first = float(captured(ids))
        once = [gradient.clone() for gradient in captured.gradients]
        assert float(captured(others)) != first
        captured.zero()
        assert float(captured(ids)) == first
        assert all(map(torch.equal, once, captured.gradients))
        captured(ids)
        for twice, gradient in zip(captured.gradients, once):
            torch.testing.assert_close(twice, 2 * gradient)
        assert [p.grad.data_ptr() for p in model.parameters()] == places

    def test_dropout_draws_anew(self, model):
        ids = torch.randint(97, (2, 8))
        captured = self.made(model.train(), ids)
        assert len({float(captured(ids)) for _ in range(3)}) == 3

    def test_what_would_be_wrong_is_refused(self, model):
        ids = torch.randint(97, (2, 8))
        captured = self.made(model, ids)
        with pytest.raises(ValueError, match=r"ids are \(2, 7\); \(2, 8\) is what was captured"):
            captured(ids[:, :7])
        model.zero_grad(set_to_none=True)
        with pytest.raises(RuntimeError, match=r"a gradient was replaced; zero\(\) keeps them"):
            captured(ids)
        with pytest.raises(TypeError, match="CapturedGradients: ids is"):
            self.made(model, [[1, 2]])


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cpu", {}, "the model is on cpu; a CUDA graph is for an NVIDIA GPU"),
        ("cuda", {"processes": 2}, "2 processes average their gradients outside of a graph"),
        ("cuda", {"compiled": True}, "torch.compile makes graphs of its own"),
    ],
)
def test_what_cannot_be_captured(device, options, reason):
    assert refusal(torch.device(device), **options) == reason


def test_a_run_that_cannot_is_refused_before_any_work(data, tmp_path):
    with pytest.raises(ValueError, match="training: capture cannot be served: the model is on cpu"):
        start(data, tmp_path / "out", capture=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "pure-bfloat16"])
def test_on_a_gpu_the_losses_are_those_of_ordinary_steps(data, tmp_path, dtype):
    found = []
    for capture in (False, True):
        model = build(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).cuda()
        run = start(data, tmp_path / str(capture), model=model, steps=8, dtype=dtype, capture=capture)
        found.append([run.take_step()["loss"] for _ in range(8)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
