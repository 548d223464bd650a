"""The decoder against transformers, and its own promises: cache, checkpointing, config, compile."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from paged import Rows

from halfbyte.errors import ContextLengthError, UnsupportedModelError
from halfbyte.kv_cache import KVCache
from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, adapter_parameters, inject
from halfbyte.models import Decoder, DecoderConfig
from halfbyte.models.norm import RMSNorm
from halfbyte.models.rope import RotaryEmbedding

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (model_type, fields beside SHAPE)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_key_value_heads": 1}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_parameters": {
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            }
        },
    ),
    "llama-yarn-attention-factor": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 0.7}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen2-window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def raw_config(name: str, **changes) -> dict:
    model_type, fields = FAMILIES[name]
    return {"model_type": model_type, **SHAPE, **fields, **changes}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that attention, norms and biases all matter to the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        scale = 0.2 if param.dim() == 1 else 1.5 / param.shape[-1] ** 0.5
        param.data = (noise * scale + ("norm" in name)).to(param.dtype)


def decoder(name: str = "llama", **changes) -> Decoder:
    model = Decoder(DecoderConfig.from_dict(raw_config(name, **changes)))
    randomize(model)
    return model.eval()


def token_ids(*shape: int, vocab: int = SHAPE["vocab_size"], seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def pair(name: str):
    """The same random weights in transformers' model and in ours."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    raw = raw_config(name)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    reference = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomize(reference)
    written = {**config.to_dict(), "architectures": [type(reference).__name__]}
    ours = Decoder(DecoderConfig.from_dict(json.loads(json.dumps(written)))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name):
    reference, ours = pair(name)
    ids = token_ids(2, 23)
    with torch.no_grad():
        expected, got = reference(ids).logits, ours(ids).logits
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_loss_and_gradients_equal_transformers(name):
    reference, ours = pair(name)
    ids = token_ids(2, 11)
    labels = ids.clone()
    labels[0, :4] = labels[1, 8:] = -100
    expected = reference(ids, labels=labels).loss
    got = ours(ids, labels=labels)
    assert got.logits is None
    assert abs(got.loss.item() - expected.item()) <= 1e-5
    expected.backward()
    got.loss.backward()
    wanted = dict(reference.named_parameters())
    for key, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, wanted[key].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast_rounds_as_in_transformers(name, dtype):
    reference, ours = pair(name)
    ids = token_ids(2, 23)
    exact = ours(ids).logits
    with torch.autocast("cpu", dtype=dtype):
        expected, got = reference(ids).logits, ours(ids).logits
    assert got.dtype == expected.dtype == dtype
    distance = (expected.float() - exact).abs().max()
    assert 0 < (got.float() - exact).abs().max() <= 2 * distance


def test_gradients_under_autocast_are_those_of_the_recomputed_layers():
    model, ids = decoder("llama").train(), token_ids(2, 13)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append({key: param.grad.clone() for key, param in model.named_parameters()})
    for key, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][key]), key


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_every_module_that_computes(grad):
    model = decoder("qwen3")
    names = {n for n, module in model.named_modules() if next(module.children(), None) is None}
    names -= {"model.rotary_emb"}
    seen = set()
    for name in names:
        hook = model.get_submodule(name).register_forward_hook
        hook(lambda *_, name=name: seen.add(name))
    with torch.set_grad_enabled(grad):
        model(token_ids(1, 5))
    assert seen == names


def test_num_items_divides_the_summed_loss():
    model, ids = decoder(), token_ids(2, 9)
    labels = ids.clone()
    labels[:, :5] = -100
    mean = model(ids, labels=labels).loss
    halved = model(ids, labels=labels, num_items=16).loss
    torch.testing.assert_close(halved, mean * 8 / 16)


def test_right_padding_does_not_change_a_row():
    model, ids = decoder("mistral-window"), token_ids(1, 9)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), 1)
    labels = torch.cat((ids, torch.full((1, 4), -100)), 1)
    torch.testing.assert_close(
        model(padded, labels=labels).loss, model(ids, labels=ids).loss, rtol=1e-5, atol=1e-6
    )


class Scaled(torch.nn.Module):
    """A stand-in for an adapted head: a head whose matrix cannot be read."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.base(x) * self.scale


def test_loss_under_a_replaced_head():
    model = decoder()
    model.lm_head = Scaled(model.lm_head)
    ids = token_ids(3, 200)  # more tokens than one chunk of the head
    loss = model(ids, labels=ids).loss
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, model.lm_head.scale)
    (wanted,) = torch.autograd.grad(expected, model.lm_head.scale)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_stories260k_logits_equal_transformers(shared):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder = shared / "models" / "stories260K"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    raw = json.loads((folder / "config.json").read_text())
    ours = Decoder(DecoderConfig.from_dict(raw)).eval()
    ours.load_state_dict({**load_file(folder / "model.safetensors")}, strict=False)
    ids = token_ids(2, 300, vocab=512)
    with torch.no_grad():
        assert (ours(ids).logits - reference(ids).logits).abs().max() <= 1e-4


# --- cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_prefill_then_decode_equals_one_forward(name):
    model, ids = decoder(name), token_ids(2, 40)
    full = model(ids).logits
    rows = Rows(model, 2)
    pieces = [rows(ids[:, :7]).logits]
    pieces.append(rows(ids[:, 7:29]).logits)  # more tokens onto a filled cache
    pieces.append(rows.decode(ids[:, 29:]))
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-5, atol=1e-5)
    assert rows.lengths == [40, 40]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
@torch.no_grad()
def test_rows_of_different_lengths_decode_together(name):
    model = decoder(name)
    lengths, steps = [3, 12, 7], 6
    ids = token_ids(3, 12 + steps)
    rows = Rows(model, 3)
    logits = [rows(ids[:, :12], lengths, last_only=True).logits]
    for step in range(steps):
        new = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])[:, None]
        logits.append(rows(new, last_only=True).logits)
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, : n + steps]).logits[0, n - 1 :]
        together = torch.cat([step[row] for step in logits])
        # Against fp64 each of them is off by 1e-5 where logits are as large as here.
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert rows.lengths == [n + steps for n in lengths]


@pytest.mark.parametrize("mode", ["inference", "training", "checkpointed"])
def test_the_last_token_alone_equals_it_among_all(mode):
    model, ids = decoder("llama"), token_ids(2, 20)
    model.train(mode != "inference").gradient_checkpointing = mode == "checkpointed"
    with torch.set_grad_enabled(mode != "inference"):
        got = model(ids, last_only=True).logits
        torch.testing.assert_close(got, model(ids).logits[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_chunks_of_different_rows_are_prefilled_together():
    """Rows with different pasts and different numbers of new tokens in one forward."""
    model, ids = decoder("mistral-window"), token_ids(2, 40)
    rows = Rows(model, 2)
    rows(ids[:, :20], [20, 5])
    new = torch.stack((ids[0, 20:33], ids[1, 5:18]))
    got = rows(new, [3, 13]).logits
    full = model(ids).logits
    assert (got[0, :3] - full[0, 20:23]).abs().max() <= 1e-5
    assert (got[1] - full[1, 5:18]).abs().max() <= 1e-5
    again = rows(torch.stack((ids[0, 23:25], ids[1, 18:20]))).logits
    assert (again[0] - full[0, 23:25]).abs().max() <= 1e-5
    assert (again[1] - full[1, 18:20]).abs().max() <= 1e-5


@torch.no_grad()
def test_selected_rows_go_on_alone():
    model, ids = decoder("mistral-window"), token_ids(3, 14)
    rows = Rows(model, 3)
    rows(ids[:, :13], [4, 9, 13])
    rows.select([2, 0])
    got = rows(torch.stack((ids[2, 13:14], ids[0, 4:5]))).logits
    assert (got[0, 0] - model(ids[2:3, :14]).logits[0, -1]).abs().max() <= 1e-5
    assert (got[1, 0] - model(ids[0:1, :5]).logits[0, -1]).abs().max() <= 1e-5


@torch.no_grad()
def test_full_cache_says_its_numbers():
    model = decoder()
    rows = Rows(model, 1, max_len=16)
    rows(token_ids(1, 14))
    with pytest.raises(ContextLengthError, match="14 cached .* 3 new tokens .* 16"):
        rows(token_ids(1, 3))
    rows(token_ids(1, 2))
    assert rows.lengths == [16]


@torch.no_grad()
def test_steps_that_do_not_fit_are_refused():
    model = decoder()
    rows = Rows(model, 2)
    step = rows.cache.step(rows.tables, [0, 0], [3, 5])
    with pytest.raises(ValueError, match=r"expected ids \[2, 5\], got \[2, 4\]"):
        model(token_ids(2, 4), cache=step)
    with pytest.raises(ValueError, match=r"expected ids \[2, 5\], got \[1, 5\]"):
        model(token_ids(1, 5), cache=step)
    with pytest.raises(ValueError, match="a count >= 1 for each row"):
        rows.cache.step(rows.tables, [0, 0], [3, 0])
    with pytest.raises(ValueError, match="a count >= 1 for each row"):
        rows.cache.step(rows.tables, [0], [3])
    with pytest.raises(ValueError, match="at least 2 blocks, got 1"):
        KVCache(model.config, 1, torch.float32, "cpu")


def test_wrong_arguments_are_named():
    model, ids = decoder(), token_ids(1, 5)
    with pytest.raises(ValueError, match=r"ids: expected \[B, T\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"ids: expected .*, got \[0, 5\]"):
        model(ids[:0])
    with pytest.raises(ValueError, match="labels: expected the shape of ids"):
        model(ids, labels=ids[:, :3])
    with pytest.raises(ValueError, match="neither cache nor last_only"):
        model(ids, labels=ids, last_only=True)


# --- building and running --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window"])
def test_gradient_checkpointing_gives_equal_gradients(name):
    model, ids = decoder(name).train(), token_ids(2, 13)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: param.grad.clone() for key, param in model.named_parameters()}

    kept = gradients()
    model.gradient_checkpointing = True
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients()
    handle.remove()
    assert len(calls) == 2, "the layer runs again in the backward"
    for key, grad in kept.items():
        assert torch.equal(grad, recomputed[key]), key


@pytest.mark.parametrize("name", ["llama-llama3", "qwen3"])
def test_built_on_meta_and_loaded_by_assignment(name):
    model = decoder(name)
    with torch.device("meta"):
        empty = Decoder(model.config)
    assert all(param.is_meta for param in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    tied = empty.lm_head.weight is empty.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    ids = token_ids(1, 9)
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


def test_inverse_frequencies_survive_a_cast_and_are_not_saved():
    model = decoder("llama-llama3")
    before = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert not [key for key in model.state_dict() if "inv_freq" in key]
    assert model(token_ids(1, 9)).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_bfloat16_stays_near_fp32():
    model, ids = decoder("qwen3"), token_ids(1, 17)
    wide = model(ids).logits
    narrow = model.to(torch.bfloat16)(ids).logits.float()
    assert (narrow - wide).norm() / wide.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_as_transformers_does(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).to(dtype) * 30
    ours, theirs = RMSNorm(48, 1e-5).to(dtype), llama.LlamaRMSNorm(48, 1e-5).to(dtype)
    ours.weight.data = theirs.weight.data = torch.linspace(0.1, 2, 48).to(dtype)
    got, expected = ours(x), theirs(x)
    assert got.dtype == dtype
    assert (got == expected).float().mean() > 0.99, "one fp32 rounding may turn a tie"
    torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_norms_kept_in_fp32_leave_the_stream_in_its_dtype():
    model = decoder().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    assert model(token_ids(1, 5)).logits.dtype == torch.bfloat16


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_compile_traces_forward_without_graph_breaks(name, fresh_dynamo):
    model, ids = decoder(name), token_ids(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids).logits, model(ids).logits)


# torch 2.11 makes one itself while it traces cross_entropy's autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_traces_the_loss(fresh_dynamo):
    model, ids = decoder(), token_ids(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(ids, labels=ids).loss.backward()
    got = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(got, model.model.layers[0].self_attn.q_proj.weight.grad)


@torch.no_grad()
def test_compiled_decode_is_traced_once_for_all_lengths(fresh_dynamo):
    model, ids = decoder("mistral-window"), token_ids(1, 20)
    traces = []
    compiled = torch.compile(
        model, backend=lambda graph, _: traces.append(1) or graph.forward, fullgraph=True
    )
    rows = Rows(model, 1)
    rows(ids[:, :4])
    rows.model = compiled
    logits = [rows(ids[:, i : i + 1]).logits for i in range(4, 20)]
    assert (torch.cat(logits, 1) - model(ids).logits[:, 4:]).abs().max() <= 1e-5
    assert len(traces) <= 2, "the first length, then any length"


def quantized(model: Decoder) -> tuple[Decoder, Decoder]:
    """The model with 4-bit linears, and the same with their dequantized weights."""
    narrow, plain = copy.deepcopy(model), copy.deepcopy(model)
    for name, linear in model.named_modules():
        if type(linear) is not torch.nn.Linear or name == "lm_head":
            continue
        layer = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype=torch.float32
        )
        layer.quantize_(linear.weight.detach(), name=name)
        layer.bias = linear.bias
        parent, child = name.rsplit(".", 1)
        setattr(narrow.get_submodule(parent), child, layer)
        plain.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    return narrow, plain


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_4bit_linears_equal_their_dequantized_weights(name):
    narrow, plain = quantized(decoder(name))
    ids = token_ids(2, 15)
    assert (narrow(ids).logits - plain(ids).logits).abs().max() <= 1e-4
    rows = Rows(narrow, 2)
    pieces = [rows(ids[:, :9]).logits, rows.decode(ids[:, 9:])]
    assert (torch.cat(pieces, 1) - plain(ids).logits).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_adapters_over_4bit_train_checkpointed_and_compiled(fresh_dynamo):
    model, _ = quantized(decoder("qwen3"))
    inject(model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
    for adapter in adapter_parameters(model):
        adapter.data.normal_(0, 0.1)
    model.train()
    ids = token_ids(2, 11)

    def gradients(run):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        return [adapter.grad.clone() for adapter in adapter_parameters(model)]

    expected = gradients(model)
    assert all(grad.abs().max() > 0 for grad in expected)
    compiled = gradients(torch.compile(model, backend="eager", fullgraph=True))
    model.gradient_checkpointing = True
    for got in (compiled, gradients(model)):
        for grad, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_attention_dropout_acts_in_training_only():
    model, ids = decoder(attention_dropout=0.5), token_ids(1, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
@torch.no_grad()
def test_gpu_equals_cpu(name):
    model, ids = decoder(name), token_ids(3, 19)
    expected = model(ids).logits
    model = copy.deepcopy(model).cuda()
    rows = Rows(model, 3)
    logits = [rows(ids[:, :9]).logits, rows.decode(ids[:, 9:])]
    assert (torch.cat(logits, 1).cpu() - expected).abs().max() <= 1e-4


# --- config ----------------------------------------------------------------------------------


def test_both_spellings_read_alike():
    new = {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3, "dtype": "bfloat16"}
    scaling = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}
    theta = scaling.pop("rope_theta")
    old = {**SHAPE, "model_type": "llama", "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    old["rope_theta"] = theta
    assert DecoderConfig.from_dict(new) == DecoderConfig.from_dict(old)
    assert DecoderConfig.from_dict(old).raw == old
    both = {**new, **old}
    assert DecoderConfig.from_dict(both) == DecoderConfig.from_dict(new)


def test_config_reads_ids_and_architecture():
    raw = {**SHAPE, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": [3, 5]}
    config = DecoderConfig.from_dict({**raw, "bos_token_id": 2})
    assert (config.model_type, config.bos_token_id, config.eos_token_ids) == ("qwen2", 2, (3, 5))
    assert config.qkv_bias and not config.o_bias


def test_null_and_missing_fields_take_the_family_defaults():
    raw = {**SHAPE, "model_type": "llama", "num_key_value_heads": None, "head_dim": None}
    config = DecoderConfig.from_dict(raw)
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    assert config.rope.rope_theta == 10000.0
    assert DecoderConfig.from_dict({**SHAPE, "model_type": "qwen3"}).head_dim == 128
    windowed = DecoderConfig.from_dict({**SHAPE, "model_type": "mistral"})
    assert windowed.sliding_windows == (4096,) * 3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
REFUSED = {
    "model_type": ({"model_type": "gpt2"}, "model_type: .*llama.*'gpt2'"),
    "architectures": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "other-type": ({"architectures": ["Qwen3ForCausalLM"]}, "model_type: .*'qwen3'.*'llama'"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    "rope_type": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type: .*default, linear, llama3, yarn, got 'dynamic'",
    ),
    "rope-missing": ({"rope_scaling": {"type": "linear"}}, "factor .*positive number, got None"),
    "rope-unknown": ({"rope_scaling": {"type": "linear", "mrope_section": [1]}}, "mrope_section"),
    "llama3-missing": (
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
        "low_freq_factor",
    ),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial_in_rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "missing": ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor of 6"),
    "hidden": ({"hidden_size": 50}, "hidden_size: expected a multiple of 6"),
    "head_dim": ({"head_dim": 7}, "head_dim: expected an even"),
    "layer_types": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
        "layer_types",
    ),
    "llama-layer-types": ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "architectures-text": ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list"),
    "architectures-nested": ({"architectures": [["LlamaForCausalLM"]]}, "architectures: .*Llama"),
    "model_type-list": ({"model_type": ["llama"]}, r"model_type: .*got \['llama'\]"),
    "size-text": ({"vocab_size": "60"}, "vocab_size: expected a positive integer, got '60'"),
    "size-flag": ({"num_hidden_layers": True}, "num_hidden_layers: .*got True"),
    "size-huge": ({"hidden_size": 10**30}, "hidden_size: expected a positive integer, got 10"),
    "heads-zero": ({"num_key_value_heads": 0}, "num_key_value_heads: .*got 0"),
    "head_dim-flag": ({"head_dim": True}, "head_dim: expected an even"),
    "eps-text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a positive number, got '1e-6'"),
    "eps-negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps: .*got -1e-06"),
    "eps-nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: .*got nan"),
    "eps-null": ({"rms_norm_eps": None}, "rms_norm_eps: .*got None"),
    "flag-text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings: .*true or false, got 'f"),
    "flag-number": ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
    "dropout-text": ({"attention_dropout": "0"}, "attention_dropout: expected a number from 0"),
    "dropout-one": ({"attention_dropout": 1.0}, "attention_dropout: .*got 1.0"),
    "dtype": ({"torch_dtype": 16}, "dtype: expected a name such as 'bfloat16', got 16"),
    "eos-text": ({"eos_token_id": "</s>"}, "eos_token_id: expected token ids of 0 or more"),
    "eos-flag": ({"eos_token_id": [2, True]}, r"eos_token_id: .*got \[2, True\]"),
    "bos-negative": ({"bos_token_id": -1}, "bos_token_id: .*got -1"),
    "pad-object": ({"pad_token_id": {"id": 1}}, "pad_token_id: expected token ids"),
    "layer_types-number": ({"layer_types": 3}, "layer_types: .*got 3"),
    "layer_types-nested": ({"layer_types": [["full_attention"]] * 3}, "layer_types: expected 3 of"),
    "window-flag": (
        {"model_type": "mistral", "sliding_window": True},
        "sliding_window: expected a positive integer",
    ),
    "window-switch": (
        {"model_type": "qwen2", "use_sliding_window": "no"},
        "use_sliding_window: expected true or false, got 'no'",
    ),
    "window-layers": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"},
        "max_window_layers: expected an integer of 0 or more, got '2'",
    ),
    "rope-list": ({"rope_scaling": [2.0]}, r"rope_scaling: expected an object, got \[2.0\]"),
    "rope-theta-text": ({"rope_theta": "1e4"}, "rope_theta of rope_parameters: .*got '1e4'"),
    "rope-theta-one": ({"rope_theta": 1.0}, "rope_theta: expected more than 1, got 1.0"),
    "rope-factor-inf": (
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        "factor of rope_parameters: expected a positive number, got inf",
    ),
    "rope-original-text": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": "16"}},
        "original_max_position_embeddings: expected a positive integer, got '16'",
    ),
    "rope-attention-text": (
        {"rope_scaling": YARN | {"attention_factor": "1"}},
        "attention_factor .*got '1'",
    ),
    "rope-beta-text": ({"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast .*got '32'"),
    "rope-mscale-list": (
        {"rope_scaling": YARN | {"mscale": [1], "mscale_all_dim": 1}},
        r"mscale .*got \[1\]",
    ),
    "rope-truncate-number": ({"rope_scaling": YARN | {"truncate": 0}}, "truncate: .*got 0"),
    "llama3-ramp": (
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "high_freq_factor: expected more than low_freq_factor 4.0, got 4.0",
    ),
    "no-window": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
        "sliding_window: expected a positive integer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_configs_name_the_field(case):
    changes, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderConfig.from_dict(raw_config("llama", **changes))


def test_rotation_is_one_by_hand():
    """Position p turns the pair (x[i], x[i + D/2]) by p * theta^(-2i/D) radians."""
    config = DecoderConfig.from_dict(raw_config("llama"))
    cos, sin = RotaryEmbedding(config.rope, 8)(torch.tensor([[5]]), torch.float32)
    for i in range(4):
        angle = torch.tensor(5 * 10000.0 ** (-2 * i / 8))
        torch.testing.assert_close(cos[0, 0, 0, i], angle.cos())
        torch.testing.assert_close(sin[0, 0, 0, i + 4], angle.sin())
        torch.testing.assert_close(sin[0, 0, 0, i], -angle.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_of_angles_is_that_of_each_position(device, dtype):
    config = DecoderConfig.from_dict(raw_config("llama"))
    embedding = RotaryEmbedding(config.rope, 80)
    table = embedding.table(3000, dtype, device)
    for lengths in (torch.tensor([1]), torch.arange(1, 3000, 97), torch.tensor([2999, 5, 5])):
        lengths = lengths.int().to(device)
        expected = embedding(lengths[:, None].long() - 1, dtype)
        for got, angles in zip(table.index_select(1, lengths), expected, strict=True):
            assert torch.equal(got[:, None, None], angles)
