"""A cache of 8-bit codes: what it costs, what it saves, and that nothing else changes."""

from __future__ import annotations

import gzip

import pytest
import torch
from paged import Rows
from test_generate import tiny

from halfbyte import Engine, Sampling, checkpoint
from halfbyte.kv_cache import KVCache, block_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def model():
    return tiny(max_position_embeddings=256)


def rows_of(model, batch: int, kv_dtype: str | None) -> Rows:
    rows = Rows(model, batch)
    rows.cache = KVCache(
        model.config,
        rows.cache.blocks,
        rows.cache.layers[0].keys.dtype,
        rows.cache.device,
        kv_dtype,
    )
    return rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompt_and_decode_write_the_same(dtype, device):
    model = tiny().to(device, dtype)
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, single = (rows_of(model, 2, "int8") for _ in range(2))
        at_once = whole(ids).logits
        one_by_one = single.decode(ids)
        plain = model(ids.to(device)).logits
    spread = plain.float().std()
    assert (at_once - one_by_one).abs().max() <= (0.02 if dtype == torch.float32 else 0.2) * spread
    assert 0 < (at_once - plain).float().std() <= 0.05 * spread
    # A product of another number of rows rounds differently, which moves a code by one at most.
    got, expected = single.cache.layers[0], whole.cache.layers[0]
    for i, codes in enumerate(got[:2]):
        assert (codes.int() - expected[i].int()).abs().max() <= 1
        torch.testing.assert_close(got[2 + i], expected[2 + i], rtol=0.02, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_of_codes_keeps_its_promises(device):
    """Rows alone and together, prompts fresh and found by their prefix: the same tokens."""
    model = tiny(max_position_embeddings=256).to(device)
    prompts = [list(range(length)) for length in (1, 15, 16, 40, 64, 130)]
    engine = Engine(model, max_batch=4, kv_dtype="int8")
    options = {"max_new_tokens": 12}
    together = [reply.token_ids for reply in engine.generate(prompts, **options)]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = Engine(model, max_batch=1, kv_dtype="int8")
        assert alone.generate(prompt, **options).token_ids == tokens
    request = engine.submit(prompts[-1], Sampling(**options))
    engine.run([request])
    assert request.cached_tokens == 128 and request.reply.tokens == together[-1]


def test_a_budget_holds_nearly_twice_the_tokens():
    config = tiny(head_dim=128).config
    plain, codes = (block_bytes(config, torch.bfloat16, kv_dtype) for kv_dtype in (None, "int8"))
    assert plain / codes == 2 * 128 / (128 + 4)
    assert block_bytes(config, torch.float32) == 2 * plain
    cache = KVCache(config, 3, torch.bfloat16, "cpu", "int8")
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in layer)
    assert held == 3 * codes


def test_what_a_cache_holds_is_checked(model):
    testing = pytest.importorskip("typer.testing")
    from halfbyte import cli

    with pytest.raises(ValueError, match="kv_dtype: expected None or 'int8', got 'fp8'"):
        Engine(model, kv_dtype="fp8")
    for command in (["chat", "nowhere"], ["serve", "nowhere"]):
        result = testing.CliRunner().invoke(cli.app, [*command, "--kv-dtype", "int4"])
        assert result.exit_code == 1
        assert "kv_dtype: expected None or 'int8', got 'int4'" in result.output


@pytest.mark.slow
def test_a_real_model_hardly_notices(shared):
    """What KVCache says of SmolLM2, on a part of WikiText-2."""
    path = shared / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    model = checkpoint.load(path, None, dtype=torch.float32, device="cpu")
    text = gzip.open(shared / "data/wikitext-2/test.txt.gz", "rt").read(20_000)
    ids = torch.tensor([model.tokenizer.encode(text)[:1024]])
    logs = []
    for kv_dtype in (None, "int8"):
        rows = Rows(model, 1, max_len=ids.shape[1])
        rows.cache = KVCache(model.config, rows.cache.blocks, torch.float32, "cpu", kv_dtype)
        with torch.inference_mode():
            logs.append(rows(ids).logits[0].log_softmax(-1))
    plain, coded = logs
    losses = [-x[:-1].gather(1, ids[0, 1:, None]).mean() for x in logs]
    assert abs(losses[1] - losses[0]) <= 0.003
    assert (plain.exp() * (plain - coded)).sum(-1).mean() <= 0.001
    assert (plain.argmax(-1) == coded.argmax(-1)).float().mean() >= 0.97
