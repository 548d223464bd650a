"""LoRA: gradients against fp64, targeting, PEFT's files both ways, merging."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import nn

from halfbyte import Engine, lora
from halfbyte.errors import CheckpointError
from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, LoRALinear, SavedModule
from halfbyte.peft import BASE_FILE, CONFIG_FILE, PREFIX, WEIGHTS_FILE

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip


def decoder(quantized: bool = True) -> nn.Module:
    from halfbyte.models import Decoder, DecoderConfig

    torch.manual_seed(0)
    model = Decoder(DecoderConfig.from_dict(CONFIG))
    for name, module in list(model.named_modules()):
        if quantized and isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(module.in_features, module.out_features, module.bias is not None)
            packed.quantize_(module.weight)
            packed.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
    return model


def shake(model: nn.Module) -> nn.Module:
    """A trained-looking adapter: B is no longer zero."""
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("rslora, scaling", [(False, 16 / 4), (True, 16 / 2)])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_gradients_against_fp64(device, rslora, scaling, shape):
    base = Linear4bit(65, 33, device=device).quantize_(torch.randn(33, 65, device=device))
    layer = LoRALinear(base, 4, 16, use_rslora=rslora)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(*shape, 65, device=device, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    twin = [
        t.detach().double().requires_grad_() for t in (x, layer.lora_A.weight, layer.lora_B.weight)
    ]
    w, b = base.dequantize(torch.float32).double(), base.bias.double()
    expected = twin[0] @ w.t() + b + scaling * (twin[0] @ twin[1].t() @ twin[2].t())
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip((x, layer.lora_A.weight, layer.lora_B.weight), twin, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input(device, dtype):
    base = Linear4bit(64, 32, bias=False).quantize_(torch.randn(32, 64)).to(device)
    layer = LoRALinear(base, 8, 16)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    x = torch.randn(7, 64, device=device, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and layer.lora_A.weight.dtype == torch.float32
    exact = x.double() @ (base.dequantize(torch.float32).double() + layer.delta().double()).t()
    assert ((y.double() - exact).norm() / exact.norm()) < 1e-2


def test_starts_as_the_base_and_freezes_it():
    model = decoder()
    before = logits(model)
    lora.inject(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    assert len(trainable) == 2 * 7 * 2
    a = model.model.layers[0].mlp.down_proj.lora_A.weight
    assert a.abs().max() <= 1 / 96**0.5 and a.std() > 0.5 / (3 * 96) ** 0.5


def test_dropout_acts_in_training_only():
    layer = shake(LoRALinear(Linear4bit(64, 8).quantize_(torch.randn(8, 64)), 4, 8, 0.5))
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "targets, count",
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["mlp.up_proj"], 2),
        (["model.layers.1.self_attn.k_proj"], 1),
        (r".*layers\.0\..*(q|k)_proj", 2),
    ],
)
def test_targets(targets, count):
    model = lora.inject(decoder(), LoraConfig(r=2, target_modules=targets))
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == count
    assert not isinstance(model.lm_head, LoRALinear)


@pytest.mark.parametrize("targets", [["qproj"], r"q_proj", ["q_proj", "nothing"]])
def test_targets_that_match_nothing(targets):
    with pytest.raises(ValueError, match="matches.*Hint.*q_proj"):
        lora.inject(decoder(), LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"target_modules": "q_proj"}, "whole-path pattern q_proj.*Hint"),
        ({"target_modules": "("}, "no regular expression: .*unterminated"),
        ({"modules_to_save": "lm_head"}, r"expected a list of names, got 'lm_head'. Hint: \['lm_"),
        ({"modules_to_save": ["mlp"]}, "weights of their own, got .*mlp.*, which hold modules"),
        ({"modules_to_save": ["nothing"]}, "no module matches"),
    ],
)
def test_names_that_cannot_be_meant(wish, message):
    with pytest.raises(ValueError, match=f"LoraConfig: {next(iter(wish))}: .*{message}"):
        lora.inject(decoder(), LoraConfig(r=4, **wish))


def test_second_injection_is_refused():
    model = lora.inject(decoder(), LoraConfig(r=2))
    with pytest.raises(ValueError, match="already carries"):
        lora.inject(model, LoraConfig(r=2))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=4, target_modules=["model.layers.1.self_attn.k_proj"]),
        LoraConfig(r=4, modules_to_save=["lm_head"]),
        LoraConfig(r=4, bias="all"),
    ],
)
def test_round_trip(tmp_path, config):
    model = shake(lora.inject(decoder(), config))
    lora.save_adapter(model, tmp_path)
    again = lora.load_adapter(decoder(), tmp_path)
    assert torch.equal(logits(model), logits(again))
    assert not any(p.requires_grad for p in again.parameters())
    resumed = lora.load_adapter(decoder(), tmp_path, trainable=True)
    assert len(lora.adapter_parameters(resumed)) == len(lora.adapter_parameters(model))


@pytest.mark.parametrize("frozen", ["", "lora_A", "lora"])
def test_an_adapter_is_saved_whole_whatever_trains(tmp_path, frozen):
    model = shake(lora.inject(decoder(), LoraConfig(r=4, modules_to_save=["lm_head"])))
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    lora.save_adapter(model, tmp_path / "once")
    again = lora.load_adapter(decoder(), tmp_path / "once")
    lora.save_adapter(again, tmp_path / "twice")
    assert torch.equal(logits(lora.load_adapter(decoder(), tmp_path / "twice")), logits(model))


def test_every_file_of_an_adapter_follows_the_umask(tmp_path):
    lora.save_adapter(lora.inject(decoder(), LoraConfig(r=2)), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_what_trains_but_no_adapter_holds_is_named(tmp_path):
    model = lora.inject(decoder(), LoraConfig(r=4))
    model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight: .* Hint: name its module in modules"):
        lora.save_adapter(model, tmp_path / "adapter")


def test_a_compiled_models_adapter_has_the_models_names(tmp_path):
    model = shake(lora.inject(decoder(), LoraConfig(r=4)))
    lora.save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert torch.equal(logits(lora.load_adapter(decoder(), tmp_path)), logits(model))


def test_norms_that_train_are_used_in_every_forward():
    model = shake(lora.inject(decoder(), LoraConfig(r=4, modules_to_save=["norm"])))
    assert len([m for m in model.modules() if isinstance(m, SavedModule)]) == 5
    with_gradients = model(IDS).logits
    assert not torch.allclose(with_gradients, logits(decoder()), atol=1e-2)
    torch.testing.assert_close(logits(model), with_gradients, rtol=1e-5, atol=1e-5)


def hf_twin(model: nn.Module):
    """transformers' model with the dequantized weights of ours."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state[f"{name}.weight"] = module.dequantize(torch.float32)
        for key, value in module.named_parameters(recurse=False):
            state.setdefault(f"{name}.{key}", value)
    twin.load_state_dict(state)
    return twin


PEFT_CASES = [
    LoraConfig(r=4),
    LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    LoraConfig(r=4, modules_to_save=["lm_head"]),
    LoraConfig(r=4, target_modules=["model.layers.1.self_attn.k_proj"]),
    LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
    LoraConfig(r=4, target_modules=["q_proj", "up_proj"], bias="all"),
    LoraConfig(r=4, target_modules=["q_proj", "up_proj"], bias="lora_only"),
]


# What transformers and PEFT warn of among themselves is not ours to mend.
PEERS_WARNINGS = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:.*(fetch remote|config file|some/base):UserWarning",
    "ignore:.*rank_pattern keys did not match:RuntimeWarning",
    "ignore:.*alpha_pattern keys did not match:RuntimeWarning",
)


@PEERS_WARNINGS
@pytest.mark.parametrize("config", PEFT_CASES)
def test_what_we_write_loads_strictly_in_peft(tmp_path, config):
    peft = pytest.importorskip("peft")
    base = decoder()
    twin = hf_twin(base)
    model = shake(lora.inject(base, config))
    lora.save_adapter(model, tmp_path, base_name="some/base")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
    from safetensors.torch import load_file

    loaded = peft.get_peft_model_state_dict(theirs)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert set(loaded) == set(ours)
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(model), rtol=1e-4, atol=1e-4)


PEFT_TARGETS = [
    "all-linear",
    ["q_proj", "v_proj"],
    r".*\.mlp\..*_proj",
    ["model.layers.0.self_attn.q_proj"],
]
PEFT_EXTRAS = [
    {},
    {"modules_to_save": ["lm_head"]},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    {"modules_to_save": ["norm"]},
    {"bias": "all"},
    {"bias": "lora_only"},
]


@PEERS_WARNINGS
@pytest.mark.parametrize("targets", PEFT_TARGETS)
@pytest.mark.parametrize("extra", PEFT_EXTRAS)
def test_what_peft_writes_loads_here(tmp_path, targets, extra):
    peft = pytest.importorskip("peft")
    base = decoder()
    theirs = peft.get_peft_model(
        hf_twin(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **extra)
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    model = lora.load_adapter(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, logits(model), rtol=1e-4, atol=1e-4)


@PEERS_WARNINGS
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapted_head_comes_from_peft_with_its_weight(tmp_path):
    peft = pytest.importorskip("peft")
    base = decoder()
    targets = ["q_proj", "lm_head"]
    theirs = peft.get_peft_model(hf_twin(base), peft.LoraConfig(r=4, target_modules=targets))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    with Engine(decoder(), {"theirs": tmp_path}, max_batch=1) as engine:
        served = engine.generate([1, 2], adapter="theirs", max_new_tokens=9).token_ids
    model = lora.load_adapter(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, logits(model), rtol=1e-4, atol=1e-4)
    assert served == model.generate([1, 2], max_new_tokens=9)
    other = decoder()
    other.lm_head.weight.data[0] += 1
    with pytest.raises(CheckpointError, match="unexpected .'lm_head.weight'"):
        lora.load_adapter(other, tmp_path)


def test_golden_adapter_with_full_paths_loads(shared):
    fields = json.loads((shared / "golden/adapter_init/adapter_config.json").read_text())
    assert fields["r"] == 4
    from safetensors.torch import load_file

    tensors = load_file(shared / "golden/adapter_init/adapter_model.safetensors")
    assert all(name.startswith(PREFIX) for name in tensors)


def test_base_record_is_compared(tmp_path):
    model = lora.inject(decoder(), LoraConfig(r=2))
    record = {"sha256": "aa", "quant_type": "nf4"}
    lora.save_adapter(model, tmp_path, base_record=record)
    with pytest.warns(UserWarning, match="another base.*sha256: trained on 'aa', loaded on 'bb'"):
        lora.load_adapter(decoder(), tmp_path, base_record={**record, "sha256": "bb"})


def damage(path, **changes):
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def test_a_runs_folder_is_not_its_adapter_but_names_it(tmp_path):
    lora.save_adapter(lora.inject(decoder(), LoraConfig(r=2)), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="no such file.* saved, such as .*adapter$"):
        lora.load_adapter(decoder(), tmp_path)


def test_damaged_adapters(tmp_path):
    model = lora.inject(decoder(), LoraConfig(r=2))
    lora.save_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: corrupt"):
        lora.load_adapter(decoder(), tmp_path)
    weights.write_bytes(whole)
    damage(tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        lora.load_adapter(decoder(), tmp_path)
    damage(tmp_path, use_dora=False, peft_type="IA3")
    with pytest.raises(CheckpointError, match="IA3"):
        lora.load_adapter(decoder(), tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        lora.load_adapter(decoder(), tmp_path / "nowhere")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "pickle/adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        lora.load_adapter(decoder(), tmp_path / "pickle")


DAMAGES = {
    "no rank": (CONFIG_FILE, {"r": None}, "with a rank r"),
    "rank 0": (CONFIG_FILE, {"r": 0}, "r: expected a positive integer, got 0"),
    "rank text": (CONFIG_FILE, {"r": "x"}, "r: expected a positive integer, got 'x'"),
    "alpha": (CONFIG_FILE, {"lora_alpha": "x"}, "lora_alpha: expected a number, got 'x'"),
    "huge alpha": (CONFIG_FILE, {"lora_alpha": 1e300}, "lora_alpha: expected a number"),
    "dropout": (CONFIG_FILE, {"lora_dropout": [1]}, "lora_dropout: expected a number"),
    "other rule": (
        CONFIG_FILE,
        {"alora_invocation_tokens": [5]},
        "['alora_invocation_tokens']",
    ),
    "other base": (CONFIG_FILE, {"init_lora_weights": "pissa_niter_4"}, "leaves the base"),
    "pattern": (CONFIG_FILE, {"rank_pattern": {"(": 4}}, "rank_pattern: expected"),
    "pattern list": (CONFIG_FILE, {"rank_pattern": [1]}, "rank_pattern: expected ranks"),
    "pattern alpha": (CONFIG_FILE, {"alpha_pattern": {"q": "x"}}, "alpha_pattern: expected"),
    "saved": (CONFIG_FILE, {"modules_to_save": 5}, "modules_to_save: expected a list"),
    "list": (CONFIG_FILE, "[1]", "expected a JSON object, got list"),
    "cut": (CONFIG_FILE, "{", "expected JSON, got"),
    "deep": (CONFIG_FILE, "[" * 100_000, "expected JSON, got"),
    "base list": (BASE_FILE, "[1]", "expected a JSON object, got list"),
    "base cut": (BASE_FILE, "{", "expected JSON, got"),
    "cut weights": (WEIGHTS_FILE, "{", "corrupt or truncated"),
    "no matrix": (WEIGHTS_FILE, lambda x: x.flatten(), "lora_A.weight: expected a matrix"),
    "no pair": (WEIGHTS_FILE, lambda x: None, "lora_A.weight: missing beside"),
    "width": (WEIGHTS_FILE, lambda x: x[:, 1:].clone(), "lora_A.weight: expected ["),
}


def damaged(folder, how: str):
    """Damage one file of an adapter; what the error has to name."""
    name, change, message = DAMAGES[how]
    path = folder / name
    if callable(change):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        first = next(key for key in sorted(tensors) if key.endswith("lora_A.weight"))
        tensors[first] = change(tensors.pop(first))
        save_file({key: value for key, value in tensors.items() if value is not None}, path)
    elif isinstance(change, str):
        path.write_text(change)
    else:
        damage(folder, **change)
    return f"{path}: .*{re.escape(message)}"


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_adapters_name_file_and_field(tmp_path, how):
    lora.save_adapter(lora.inject(decoder(), LoraConfig(r=2)), tmp_path)
    expected = damaged(tmp_path, how)
    model = decoder()
    before = logits(model)
    with pytest.raises(CheckpointError, match=expected):
        lora.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    lora.inject(model, LoraConfig(r=2))
    with pytest.raises(CheckpointError, match=expected):
        Engine(decoder(), {"damaged": tmp_path}, max_batch=1)


def test_adapter_of_another_model(tmp_path):
    model = nn.Module()
    model.other = Linear4bit(8, 8).quantize_(torch.randn(8, 8))
    lora.save_adapter(lora.inject(model, LoraConfig(r=2)), tmp_path)
    with pytest.raises(CheckpointError, match="other: the model has no such linear layer"):
        lora.load_adapter(decoder(), tmp_path)


def test_merge_gives_the_trained_model():
    model = shake(lora.inject(decoder(), LoraConfig(r=4, modules_to_save=["lm_head"])))
    expected = logits(model)
    merged = lora.merge(model, torch.float32)
    assert not any(isinstance(m, LoRALinear | Linear4bit | SavedModule) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_merge_keeps_the_delta_and_can_use_the_original():
    plain = decoder(quantized=False)
    original = {n: p.detach().clone() for n, p in plain.named_parameters()}
    model = shake(lora.inject(decoder(), LoraConfig(r=4)))
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    delta, base = layer.delta(), layer.base_layer.dequantize(torch.float32)
    merged = lora.merge(model, torch.bfloat16, original).get_submodule(name).weight.float()
    effective = merged - original[f"{name}.weight"]
    assert (effective * delta).sum() / (delta * delta).sum() > 0.99
    assert not torch.allclose(merged, base + delta, atol=1e-3)


@pytest.mark.parametrize("change", [lambda x: None, lambda x: x[:1]])
def test_merge_into_another_model_is_refused_and_changes_nothing(change):
    model = shake(lora.inject(decoder(), LoraConfig(r=4)))
    expected = logits(model)
    original = {n: p.detach() for n, p in decoder(quantized=False).named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    original[name] = change(original[name])
    with pytest.raises(CheckpointError, match=f"{name}: expected .96, 64., got"):
        lora.merge(model, torch.float32, original)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kwargs, word", [({"r": 0}, "r"), ({"lora_dropout": 1.0}, "lora_dropout"),
                                          ({"lora_alpha": math.nan}, "lora_alpha"),
                                          ({"bias": "some"}, "bias")])  # fmt: skip
def test_bad_config(kwargs, word):
    with pytest.raises(ValueError, match=f"LoraConfig: {word}"):
        LoraConfig(**kwargs)
