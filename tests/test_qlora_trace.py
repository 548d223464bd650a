"""Eight QLoRA steps on golden/tiny_llama_bnb4, against the losses of PEFT with bitsandbytes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from halfbyte.checkpoint import load
from halfbyte.lora import LoRALinear, adapter_parameters, adapter_tensors, load_adapter
from halfbyte.models import attention
from halfbyte.optim import AdamW
from halfbyte.train import TrainConfig, finetune

# All fp32, unrounded 4-bit weights in the forward and in the backward.
LOSSES = [4.588488, 4.465230, 4.349851, 4.258799, 4.140882, 4.010498, 3.933450, 3.854753]
NORMS = [0.402117, 0.332275, 0.327327, 0.412762, 0.533248, 0.718488, 1.013931, 0.695870]


@pytest.fixture(scope="module")
def trace(shared) -> dict:
    return json.loads((shared / "golden" / "train_trace.json").read_text())


def adapted(shared, dtype: torch.dtype, device: torch.device | str = "cpu"):
    base = load(shared / "golden" / "tiny_llama_bnb4", dtype=dtype, device=device, progress=False)
    return load_adapter(base, shared / "golden" / "adapter_init", trainable=True)


def train(model, trace, optimizer_class, device="cpu") -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, as a user's own loop measures them."""
    ids, labels = (torch.tensor(trace[key], device=device) for key in ("ids", "labels"))
    parameters = adapter_parameters(model)
    optimizer = optimizer_class(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    measured = []
    for _ in range(8):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        measured.append((loss.item(), norm.item()))
    return measured


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW], ids=["torch", "halfbyte"])
def test_fp32_trace(shared, trace, optimizer, device):
    measured = train(adapted(shared, torch.float32, device), trace, optimizer, device)
    assert [loss for loss, _ in measured] == pytest.approx(LOSSES, abs=1e-5)
    assert [norm for _, norm in measured] == pytest.approx(NORMS, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp32_trace_through_finetune(shared, trace, tmp_path, checkpointing):
    rows = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(trace["ids"], trace["labels"], strict=True)
    ]
    result = finetune(
        TrainConfig(
            adapted(shared, torch.float32),
            rows,
            tmp_path,
            learning_rate=1e-2,
            max_steps=8,
            per_device_batch_size=1,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            progress=False,
        )
    )
    measured = [json.loads(row) for row in result.metrics_path.read_text().splitlines()]
    assert result.losses == pytest.approx(LOSSES, abs=1e-5)
    assert [row["grad_norm"] for row in measured] == pytest.approx(NORMS, abs=1e-5)


def golden_precision(model):
    """Linear layers and adapters in fp32 between bf16 activations, as in the golden run."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
            module.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    return model


@pytest.fixture(scope="module")
def final_tensors(shared) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "adapter_final" / "adapter_model.safetensors")


@pytest.fixture
def by_torch(request, monkeypatch):
    """Norms, gates and attention as the golden run had them, where asked for."""
    if request.param:
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
            pytest.skip(
                "without AVX-512 torch rounds bf16 elsewhere: PEFT with bitsandbytes itself is "
                "further from the golden run than is stated (a norm by 0.05 %, a gradient by 12)"
            )
        for module in ("rms_norm", "swiglu"):
            ops = sys.modules[f"halfbyte.ops.{module}"]
            monkeypatch.setattr(ops, "is_left_to_torch", lambda x: x.is_cpu)
        monkeypatch.setattr(attention, "SHORT", 0)


@pytest.mark.parametrize(
    ("by_torch", "precision", "loss_off", "norm_off", "cosine", "one_off"),
    [
        # By so much independent implementations with a bf16 residual stream deviate.
        (True, golden_precision, 2.1e-3, 3e-4, 0.998, 0.095),
        # Linear layers that round to bf16 as well, which the golden run's did not: 0.9979 where
        # this was last measured, on a Zen 4.
        (True, lambda model: model, 4e-3, 5e-4, 0.997, 0.095),
        # Norms, gates and attention that round elsewhere than torch's in bf16: 2.1e-3, 7e-4,
        # 0.9973 and 0.092 on a Sapphire Rapids.
        (False, lambda model: model, 4e-3, 2e-3, 0.996, 0.12),
    ],
    ids=["bf16-stream", "bf16", "ours"],
    indirect=["by_torch"],
)
def test_golden_trace(
    shared, trace, final_tensors, by_torch, precision, loss_off, norm_off, cosine, one_off
):
    """On the CPU, as the golden run: bf16 rounding differs by device, fp32 above does not."""
    model = precision(adapted(shared, torch.bfloat16))
    before = {name: value.cpu().clone() for name, value in adapter_tensors(model).items()}
    measured = train(model, trace, torch.optim.AdamW)
    expected = trace["trace_loss_gradnorm"]
    assert measured[0][0] == pytest.approx(expected[0][0], abs=2e-4)
    assert measured[0][1] == pytest.approx(expected[0][1], rel=1e-3)
    for (loss, norm), (golden_loss, golden_norm) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(golden_loss, abs=loss_off)
        assert norm == pytest.approx(golden_norm, rel=0.1)
    after = adapter_tensors(model)
    update = torch.cat([(after[name].cpu() - before[name]).flatten() for name in before])
    golden = torch.cat([(final_tensors[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(update, golden, dim=0) > cosine
    assert (update.norm() / golden.norm()).item() == pytest.approx(1, abs=norm_off)
    assert (update - golden).abs().max() < one_off
