"""Micro-batches replayed as CUDA graphs: the numbers of a plain loop, and when not to replay."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, LoRALinear, adapter_parameters, inject
from halfbyte.optim import AdamW
from halfbyte.train import MicroSteps, micro_steps

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SIZES = {"hidden_size": 256, "intermediate_size": 512}
# Every shape comes again, one with a step of two micro-batches.
STEPS = [[(2, 24)], [(2, 24)], [(1, 40), (2, 24)], [(2, 24), (1, 40)], [(1, 40)], [(2, 24)]]


def adapted(device="cpu", dropout=0.0):
    """A 4-bit decoder in bf16 whose adapter is trained."""
    model = tiny_model(**SIZES).to(device, torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, bias=False)
            layer.quantize_(module.weight.detach(), name=name)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    inject(model, config, torch.Generator().manual_seed(1))
    model.to(device).train()
    model.gradient_checkpointing = True
    return model


def batches(device, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(2, 258, shape, generator=generator).to(device) for shape in shapes]
        for shapes in steps
    ]


def plain(model, ids, num_items):
    loss = model(ids, labels=ids, num_items=num_items).loss
    loss.backward()
    return loss.detach()


def assert_plain_sums(model, optimizer, batches):
    """The gradients are those that a plain loop over the batches adds up."""
    sums = [p.grad.clone() for p in adapter_parameters(model)]
    optimizer.zero_grad()
    for ids in batches:
        plain(model, ids, 100)
    for param, total in zip(adapter_parameters(model), sums, strict=True):
        assert torch.equal(param.grad, total)


def train(optimizer, micro_step, steps):
    """Losses of all micro-batches; the optimizer steps after each list of them."""
    losses = []
    for ids_of_step in steps:
        num_items = sum(ids.numel() for ids in ids_of_step)
        losses += [micro_step(ids, num_items) for ids in ids_of_step]
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def trained(device, use_graphs, steps=None, **options):
    model = adapted(device, **options)
    optimizer = AdamW(adapter_parameters(model), 1e-2, weight_decay=0.1)
    repeated = MicroSteps(model, optimizer)

    def micro_step(ids, num_items):
        if use_graphs:
            return repeated(ids, ids, num_items)
        return plain(model, ids, num_items)

    losses = train(optimizer, micro_step, steps or batches(device))
    return losses, [p.detach().clone() for p in adapter_parameters(model)], repeated


def test_the_numbers_are_those_of_a_plain_loop(device):
    losses, params, repeated = trained(device, use_graphs=True)
    expected_losses, expected_params, _ = trained(device, use_graphs=False)
    assert torch.equal(losses, expected_losses)
    assert len(set(losses.tolist())) == len(losses)
    for param, expected in zip(params, expected_params, strict=True):
        assert torch.equal(param, expected)
    assert set(repeated.graphs) == ({(2, 24), (1, 40)} if device.type == "cuda" else set())


@pytest.mark.gpu
def test_gradients_of_runs_and_replays_add_up():
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    (known, new), _ = batches("cuda", [[(2, 24), (3, 16)], []])
    for _ in range(2):
        repeated(known, known, 100)
        optimizer.zero_grad()
    assert set(repeated.graphs) == {(2, 24)}
    for ids in (known, new, known):
        repeated(ids, ids, 100)
    assert_plain_sums(model, optimizer, [known, new, known])


@pytest.mark.gpu
def test_shapes_that_come_far_more_often_take_over(monkeypatch):
    monkeypatch.setattr(micro_steps, "MOST_GRAPHS", 1)
    lengths = [16, 16, 24, 24, 24, 16, 24]
    losses, _, repeated = trained("cuda", True, batches("cuda", [[(1, n)] for n in lengths]))
    assert set(repeated.graphs) == {(1, 16)}
    plain_losses, _, _ = trained("cuda", False, batches("cuda", [[(1, n)] for n in lengths]))
    assert torch.equal(losses, plain_losses)
    repeated = trained("cuda", True, batches("cuda", [[(1, n)] for n in [16, 16, *[24] * 4]]))[2]
    assert set(repeated.graphs) == {(1, 24)}


@pytest.mark.gpu
def test_lengths_beside_each_other_share_a_graph():
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    for length in (64, 61, 63, 57):
        ((ids,),) = batches("cuda", [[(2, length)]])
        loss = repeated(ids, ids, 100)
        replayed = [p.grad.clone() for p in adapter_parameters(model)]
        optimizer.zero_grad()
        torch.testing.assert_close(loss, plain(model, ids, 100), rtol=1e-3, atol=0)
        for param, gradient in zip(adapter_parameters(model), replayed, strict=True):
            close = torch.linalg.vector_norm(param.grad - gradient)
            assert close <= 0.02 * torch.linalg.vector_norm(param.grad)
        optimizer.zero_grad()
    assert set(repeated.graphs) == {(2, 64)}


@pytest.mark.gpu
def test_what_keeps_a_gpu_busy_is_neither_padded_nor_captured(monkeypatch):
    monkeypatch.setattr(micro_steps, "MOST_WORK", 1)
    losses, _, repeated = trained("cuda", True, batches("cuda", [[(2, 21)]] * 3))
    assert not repeated.graphs
    assert torch.equal(losses, trained("cuda", False, batches("cuda", [[(2, 21)]] * 3))[0])


@pytest.mark.parametrize(
    "length, padded", [(1, 8), (8, 8), (9, 16), (130, 144), (256, 256), (257, 288), (1025, 1152)]
)
def test_padded_lengths(length, padded):
    ids = torch.ones(2, length, dtype=torch.int64)
    assert micro_steps._padded(ids, -100).shape == (2, padded)
    assert micro_steps._padded(ids, -100)[:, length:].eq(-100).all()


@pytest.mark.gpu
def test_what_is_captured_sees_new_weights_and_learning_rates():
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    ((ids,),) = batches("cuda", [[(2, 24)]])
    for _ in range(3):
        repeated(ids, ids, 100)
        optimizer.zero_grad()
    with torch.no_grad():
        adapter_parameters(model)[0].add_(0.1)
    loss = repeated(ids, ids, 100)
    assert repeated.graphs
    assert torch.equal(loss, plain(model, ids, 100))


@pytest.mark.gpu
def test_a_real_capture_that_fails_leaves_torch_as_it_was(monkeypatch):
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    ((ids,),) = batches("cuda", [[(2, 24)]])
    work = repeated._work

    def reads(*args, **options):
        loss = work(*args, **options)
        loss.item()
        return loss

    monkeypatch.setattr(repeated, "_work", reads)
    stream = torch.cuda.current_stream()
    repeated(ids, ids, 100)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        repeated(ids, ids, 100)
    assert torch.cuda.current_stream() == stream and not repeated.graphs
    assert_plain_sums(model, optimizer, [ids, ids])
    # And another one can capture.
    other = MicroSteps(model, optimizer)
    for _ in range(2):
        other(ids, ids, 100)
    assert other.graphs


@pytest.mark.gpu
def test_what_graphs_keep_does_not_count_as_free(monkeypatch):
    monkeypatch.setattr(micro_steps, "free_memory", lambda device: 1 << 40)
    model = adapted("cuda")
    repeated = MicroSteps(model, AdamW(adapter_parameters(model), 1e-2))
    ((ids,),) = batches("cuda", [[(4, 512)]])
    for _ in range(2):
        repeated(ids, ids, 100)
    assert repeated.graphs and repeated._free() < 1 << 40
    repeated.drop()
    assert repeated._free() == 1 << 40


@pytest.mark.parametrize("error", [RuntimeError("not while it captures"), OOM])
def test_a_capture_that_fails_leaves_training_as_it_was(monkeypatch, error):
    model = adapted()
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    ((ids,),) = batches("cpu", [[(2, 24)]])

    def fail(*_):
        raise error

    monkeypatch.setattr(repeated, "_capture", fail)
    monkeypatch.setattr(repeated, "_repeats", lambda shape: repeated._most_tokens > 0)
    if error is OOM:
        repeated(ids, ids, 100)
        assert repeated._refused == {(2, 24)}
    else:
        with pytest.warns(UserWarning, match="without CUDA graphs.*not while it captures"):
            repeated(ids, ids, 100)
        assert repeated._most_tokens == 0
    repeated(ids, ids, 100)
    assert_plain_sums(model, optimizer, [ids, ids])


def watch_module(model, optimizer):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def watch_input(model, optimizer):
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)


def watch_parameter(model, optimizer):
    adapter_parameters(model)[0].register_hook(lambda grad: None)


def train_embedding(model, optimizer):
    model.model.embed_tokens.weight.requires_grad_()


def drop_out(model, optimizer):
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).p = 0.5


def adapt_head(model, optimizer):
    head = model.lm_head
    model.lm_head = LoRALinear(head, 4, 8)


def freeze(model, optimizer):
    adapter_parameters(model)[0].requires_grad_(False)


def train_norm(model, optimizer):
    model.model.norm.weight.requires_grad_()


def evict_state(model, optimizer):
    optimizer.pager.evict(1 << 40)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        watch_module,
        watch_input,
        watch_parameter,
        train_embedding,
        drop_out,
        adapt_head,
        freeze,
        train_norm,
        evict_state,
    ],
)
def test_what_may_differ_each_time_is_not_replayed(change):
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    ((ids,),) = batches("cuda", [[(2, 24)]])
    change(model, optimizer)
    for _ in range(3):
        repeated(ids, ids, 100)
    assert not repeated.graphs


@pytest.mark.gpu
def test_overlapped_updates_do_not_keep_graphs_away():
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    optimizer.overlap(model.model.layers)
    repeated = MicroSteps(model, optimizer)
    ((ids,),) = batches("cuda", [[(2, 24)]])
    for _ in range(2):
        repeated(ids, ids, 100)
    assert repeated.graphs


@pytest.mark.gpu
def test_graphs_make_way_for_what_needs_their_memory(monkeypatch):
    model = adapted("cuda")
    optimizer = AdamW(adapter_parameters(model), 1e-2)
    repeated = MicroSteps(model, optimizer)
    (ids, longer), _ = batches("cuda", [[(2, 24), (4, 64)], []])
    monkeypatch.setattr(micro_steps, "free_memory", lambda device: 0)
    for _ in range(3):
        repeated(ids, ids, 100)
    assert not repeated.graphs
    monkeypatch.undo()
    repeated(ids, ids, 100)
    assert repeated.graphs
    monkeypatch.setattr(micro_steps, "free_memory", lambda device: 0)
    repeated(longer, longer, 100)
    assert not repeated.graphs
