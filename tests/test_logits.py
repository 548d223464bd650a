"""The same logits whichever way they are computed: eager, captured, in any batch, in training."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from engines import ADAPTERS, base_model, four_bit_model, gpu_work, write_adapters
from test_generate import byte_tokenizer  # noqa: F401
from torch import Tensor

import halfbyte.models.norm
from halfbyte import Engine, LoraConfig, Sampling, linear, lora
from halfbyte.capture import Captured
from halfbyte.decode import DecodeStep, Variant
from halfbyte.models.attention import Step
from halfbyte.prefill import Shape


@pytest.fixture(params=["fp32", "4-bit"])
def make(request, device):
    """Makes a model for a tokenizer."""
    if request.param == "4-bit":
        return functools.partial(four_bit_model, device=device)
    return lambda tokenizer: base_model(tokenizer).to(device)


def started(engine: Engine, names: list[str | None]) -> DecodeStep:
    """Sequences of several lengths with these adapters, running."""
    for i, name in enumerate(names):
        engine.submit(list(range(i, 5 * i + 3)), Sampling(max_new_tokens=100), name)
    while len(engine._scheduler.running) < len(names):
        engine._advance_once()
    return engine._scheduler.decode


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_eager_capture_and_replay_have_the_same_bits(
    make,
    byte_tokenizer,  # noqa: F811
    tmp_path,
    rows,
    adapted,
):
    folders, _ = write_adapters(tmp_path, None, make)
    engine = Engine(make(byte_tokenizer), folders, max_batch=8)
    names = [*ADAPTERS, None] * 2 if adapted else [None] * 8
    decode = started(engine, names[:rows])
    decode.forwards.clear()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(4):  # as it is, captured, replayed twice
            tokens = torch.randint(256, (8,), generator=generator)
            decode.sampling.tokens.copy_(tokens)
            decode.forward(rows, adapted)
            got = decode.logits.clone()
            (key, captured), *others = decode.forwards.items()
            assert torch.equal(got, captured.work())
    assert key == Variant(1 << (rows - 1).bit_length(), adapted) and not others
    assert captured.captured is not None


@pytest.mark.gpu
def test_gpu_prompts_eager_captured_and_replayed_have_the_same_bits(
    byte_tokenizer,  # noqa: F811
    tmp_path,
):
    folders, _ = write_adapters(tmp_path, None, four_bit_model)
    scheduler = Engine(four_bit_model(byte_tokenizer), folders, max_batch=1)._scheduler
    adapters, prefill = scheduler.decode.adapters, scheduler.prefill
    generator = torch.Generator().manual_seed(0)
    table = list(range(1, 60))
    with torch.inference_mode():
        for start, count in ((0, 7), (0, 50), (0, 512), (512, 100)):
            for name in [*ADAPTERS, None] * 3:
                adapter = adapters.by_name.get(name)
                ids = torch.randint(256, (count,), generator=generator).tolist()
                with adapters.only(adapter):
                    got = prefill.read(ids, table, start, adapter is not None).clone()
                    shape = prefill._fill(ids, table, start, adapter is not None)
                    assert torch.equal(got, prefill._padded(shape))
    assert len(prefill.forwards) == 8
    assert all(isinstance(f, Captured) and f.captured for f in prefill.forwards.values())
    scheduler.rearrange()
    assert {shape.adapted for shape in prefill.forwards} == {False}


@pytest.mark.gpu
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_gpu_short_prompts_take_the_launches_of_decode_steps(
    byte_tokenizer,  # noqa: F811
    tmp_path,
    monkeypatch,
    adapted,
):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the kernels of compute capability 9.0")
    launches, launch = [], linear.gemv_4bit_fused
    monkeypatch.setattr(
        linear, "gemv_4bit_fused", lambda x, *rest: launches.append(len(x)) or launch(x, *rest)
    )
    folders, _ = write_adapters(tmp_path, None, four_bit_model)
    engine = Engine(four_bit_model(byte_tokenizer), folders, max_batch=1)
    layers = len(engine.model.model.layers)
    # The last layer's MLP sees one token.
    for count, expected in ((50, [64] * (4 * layers - 2)), (100, [])):
        launches.clear()
        prompt = list(range(count, 2 * count))  # not the beginning of the other one
        engine.generate(prompt, adapter="one" if adapted else None, max_new_tokens=1)
        assert [rows for rows in launches if rows > 1] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3, 700])
def test_gpu_replays_do_not_read_what_the_one_before_left(byte_tokenizer, length):  # noqa: F811
    """Small launches beside each other, each with an adapter to wait for: two tokens in turn."""
    model = lora.inject(four_bit_model(byte_tokenizer), LoraConfig(r=8))
    for parameter in lora.adapter_parameters(model):
        parameter.data.normal_(0, 0.05)
    engine = Engine(model, max_batch=1)
    engine.submit([i % 256 for i in range(length)], Sampling(max_new_tokens=100))
    while not engine._scheduler.running:
        engine._advance_once()
    decode, tokens = engine._scheduler.decode, (7, 201)
    with torch.inference_mode():
        expected = []
        for token in tokens:
            decode.sampling.tokens.fill_(token)
            expected.append(decode._forward(1, False).clone())
            torch.cuda.synchronize()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(1000):
            decode.sampling.tokens.fill_(tokens[i % 2])
            decode.forward(1)
            wrong += (decode.logits != expected[i % 2]).any()
    assert wrong == 0


def served(engine: Engine, prompt: list[int], name: str | None) -> tuple[list[int], Tensor]:
    """80 drawn tokens and the logits [80, vocab_size] that they were drawn from."""
    decode, seen = engine._scheduler.decode, []
    sample = decode.sample

    def spy(logits, first, kind):
        seen.append(logits[0].clone())
        return sample(logits, first, kind)

    decode.sample = spy
    options = Sampling(temperature=1.0, seed=1, max_new_tokens=80)
    tokens = engine.generate(prompt, options, name).token_ids
    del decode.sample
    assert len(tokens) == 80
    return tokens, torch.stack(seen[:80]).float()


@pytest.mark.parametrize("named", [False, True], ids=["carried", "named"])
def test_serving_rounds_as_training_does(byte_tokenizer, tmp_path, device, named):  # noqa: F811
    """In bf16 over 4 bits: no further from fp32 than training is, and from training no more."""
    trained = four_bit_model(byte_tokenizer, device)
    generator = torch.Generator().manual_seed(0)
    lora.inject(trained, LoraConfig(r=8), generator)
    for parameter in lora.adapter_parameters(trained):
        parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    lora.save_adapter(trained, tmp_path)
    exact = copy.deepcopy(trained).float()
    base = four_bit_model(byte_tokenizer, device) if named else trained
    engine = Engine(base, {"mine": tmp_path} if named else None, max_batch=1)
    trained.train().gradient_checkpointing = True
    for length in (1, 40, 600):
        prompt = torch.randint(256, (length,), generator=generator).tolist()
        tokens, got = served(engine, prompt, "mine" if named else None)
        ids = torch.tensor([[*prompt, *tokens]], device=device)
        logits = trained(ids).logits
        assert logits.requires_grad
        part = slice(length - 1, -1)
        with torch.no_grad():
            expected, truth = logits[0, part].float(), exact(ids).logits[0, part]
        rounding = (expected - truth).norm()
        assert 0 < rounding <= 8 * 2**-8 * truth.norm()
        assert (got - truth).norm() <= 1.1 * rounding
        assert (got - expected).norm() <= 1.1 * rounding


def test_the_launches_of_a_forward_wait_by_words_of_their_own(byte_tokenizer, monkeypatch):  # noqa: F811
    words, made = [], Step.launch

    def spy(*arguments, **options):
        launch = made(*arguments, **options)
        if launch is not None:
            words.append(launch.arrived.data_ptr())
            assert launch.arrived.shape == (1,)
        return launch

    monkeypatch.setattr(Step, "launch", spy)
    model = base_model(byte_tokenizer)
    engine = Engine(model, max_batch=2)
    with torch.inference_mode():
        started(engine, [None, None])._forward(2, False)
        engine._scheduler.prefill._padded(Shape(32, 0))
    calls = 4 * len(model.model.layers)
    assert len(set(words)) == 2 * calls and len(words) % calls == 0
    assert all(len(set(words[i : i + calls])) == calls for i in range(0, len(words), calls))


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_gpu_residuals_and_norms_join_the_launches_of_a_decode_step(
    byte_tokenizer,  # noqa: F811
    monkeypatch,
    rows,
    key_heads,
):
    model = four_bit_model(byte_tokenizer, num_key_value_heads=key_heads)
    engine, sums, norms = Engine(model, max_batch=rows), [], []
    decode = started(engine, [None] * rows)
    module, layers = halfbyte.models.norm, len(model.model.layers)
    add, norm = module.add_rms_norm, module.rms_norm
    monkeypatch.setattr(module, "add_rms_norm", lambda *a: sums.append(1) or add(*a))
    monkeypatch.setattr(module, "rms_norm", lambda *a: norms.append(1) or norm(*a))
    with torch.inference_mode():
        joined = decode._forward(rows, False).float()
        # The first and the last one, and those that do not wait where heads share keys.
        assert sums == [] and len(norms) == (2 if key_heads == 4 else 1 + 2 * layers)
        monkeypatch.setattr("halfbyte.linear.takes_residual", lambda *_: False)
        apart = decode._forward(rows, False).float()
    assert len(sums) == 2 * layers
    # A root's last bit follows from the order of its sum, and now and then a rounding from that.
    assert (joined - apart).norm() <= 2e-3 * apart.norm()


@pytest.mark.gpu
def test_gpu_hooks_on_blocks_see_tensors(byte_tokenizer):  # noqa: F811
    model = four_bit_model(byte_tokenizer, num_key_value_heads=4)
    engine, seen = Engine(model, max_batch=4), []
    decode = started(engine, [None] * 4)
    layer = engine.model.model.layers[1]
    with torch.inference_mode():
        expected = decode._forward(4, False).float()
        for module in (layer.self_attn, layer.mlp, layer.post_attention_layernorm):
            module.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
        found = decode._forward(4, False).float()
    assert len(seen) == 6 and all(isinstance(value, Tensor) for value in seen)
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows, rank", [(8, 4), (16, 4), (2, 300)])
def test_gpu_adapters_on_some_layers_leave_no_launch_out(
    byte_tokenizer,  # noqa: F811
    tmp_path,
    monkeypatch,
    rows,
    rank,
):
    make = functools.partial(four_bit_model, byte_tokenizer, num_key_value_heads=4)
    carrier = lora.inject(make(), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    for parameter in lora.adapter_parameters(carrier):
        torch.nn.init.normal_(parameter, std=0.05)
    lora.save_adapter(carrier, tmp_path / "some")
    model, launched = make(), []
    engine = Engine(model, {"some": tmp_path / "some"}, max_batch=rows)
    decode = started(engine, ["some"] * rows)
    made = linear.gemv_4bit_fused
    monkeypatch.setattr(linear, "gemv_4bit_fused", lambda *a: launched.append(1) or made(*a))
    with torch.inference_mode():
        found = decode._forward(rows, True).float()
        assert len(launched) == 4 * len(model.model.layers)
        monkeypatch.setattr(linear, "fuses", lambda *_: False)
        apart = decode._forward(rows, True).float()
    assert (found - apart).norm() <= 1e-2 * apart.norm()


@pytest.mark.parametrize("name", ["norm", "input_layernorm", "post_attention_layernorm"])
def test_norms_that_are_trained_in_full_serve_as_they_train(make, byte_tokenizer, name):  # noqa: F811
    model = lora.inject(make(byte_tokenizer), LoraConfig(r=4, modules_to_save=[name])).eval()
    for parameter in lora.adapter_parameters(model):
        torch.nn.init.uniform_(parameter, 0.0, 0.5)
    ids = torch.arange(20, device=model.lm_head.weight.device)[None]
    trained = model(ids).logits.float()
    with torch.no_grad():
        read = model(ids).logits.float()
    assert (read - trained).norm() <= 1e-2 * trained.norm()
    with Engine(model, max_batch=1) as engine:
        request = engine.submit(ids[0].tolist(), Sampling(max_new_tokens=1))
        engine.run([request])
    (token,) = request.reply.tokens
    top = trained[0, -1].topk(2)
    assert token == top.indices[0] or top.values[0] - top.values[1] < 0.05


# --- a row among others, on a GPU ------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [2, 4])
def test_gpu_rows_have_the_bits_of_smaller_batches(byte_tokenizer, tmp_path, key_heads):  # noqa: F811
    make = functools.partial(four_bit_model, num_key_value_heads=key_heads)
    folders, _ = write_adapters(tmp_path, None, make)
    engine = Engine(make(byte_tokenizer), folders, max_batch=16)
    decode = started(engine, [*ADAPTERS, None] * 4)
    with torch.inference_mode():
        for adapted, most in ((True, 8), (False, 16)):
            whole = decode._forward(most, adapted).clone()
            for rows in (1, 2, 4, 8):
                assert torch.equal(decode._forward(rows, adapted), whole[:rows]), (rows, adapted)
        # A row without an adapter, beside rows that have one and beside none.
        plain = decode._forward(8, False)[3::4].clone()
        assert torch.equal(decode._forward(8, True)[3::4], plain)


@pytest.mark.gpu
def test_gpu_any_mix_of_adapters_equals_each_alone(byte_tokenizer, tmp_path):  # noqa: F811
    folders, _ = write_adapters(tmp_path, None, four_bit_model)
    work, names = gpu_work(), [*ADAPTERS, None] * 6

    def replies(engine: Engine, together: int) -> list[list[int]]:
        tokens = []
        for first in range(0, len(work), together):
            part = zip(work[first:][:together], names[first:], strict=False)
            requests = [engine.submit(prompt, s, name) for (prompt, s), name in part]
            engine.run(requests)
            tokens += [request.reply.tokens for request in requests]
        return tokens

    base = four_bit_model(byte_tokenizer)
    together = Engine(base, folders, max_batch=8)
    got = replies(together, len(work))
    steps = together._scheduler.decode.forwards
    assert any(key.adapted and step.captured for key, step in steps.items())
    together.close()
    assert got == replies(Engine(base, folders, max_batch=1), 1)
