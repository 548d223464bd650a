"""draw against fp64, transformers' filters and the definition of its random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbyte.ops import draw
from halfbyte.sampling import seed_key

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.05},
]


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform(key: int, position: int) -> float:
    """splitmix64 in unbounded integers."""
    return (mix((key + position * 0x9E3779B97F4A7C15) % 2**64) >> 16) / 2**48


def drawn(
    scores: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: int = 5,
    first: int = 0,
) -> Tensor:
    """A token for each row of scores [B, V], of lengths from `first` on; -1 for none."""
    rows, vocab = scores.shape
    settings = torch.tensor([temperature, top_p, min_p]).repeat(rows, 1)
    top_k, keys = torch.full((rows,), top_k or vocab), torch.full((rows,), key)
    return reported(scores, settings, top_k, keys, torch.arange(first, first + rows))


def reported(scores: Tensor, *rows: Tensor) -> Tensor:
    """Tokens, int64, by settings, top_k, keys and lengths; every other row runs."""
    device = scores.device
    settings, top_k, keys, lengths = (x.to(device) for x in rows)
    running = torch.arange(len(scores), device=device, dtype=torch.int32) % 2
    after, got = lengths.int(), [torch.full_like(running, -7) for _ in range(2)]
    draw(scores, settings, top_k.int(), keys, running, after, *got)
    assert torch.equal(after, lengths.int() + running)
    assert torch.equal(got[0], got[1].clamp(min=0))
    return got[1].long()


def intervals(scores: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """fp64 [V + 1]: token i is drawn by the numbers from entry i to entry i + 1."""
    scores = scores.double().cpu()
    p = ((scores - scores.max()) / temperature).exp()
    order = p.sort(descending=True).values
    least = order[min(top_k, len(p)) - 1] if top_k else torch.tensor(0.0)
    left = order[order >= least]
    if top_p < 1:
        likelier = left.cumsum(0) - left
        left = left[likelier < top_p * left.sum()]
    p = p * ((p >= left.min()) & (p >= min_p * order[0]))
    return torch.cat((torch.zeros(1), p.cumsum(0))) / p.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab, scale", [(3, 1), (33, 2), (1000, 3), (32001, 3), (32001, 0.01)])
def test_equals_fp64(vocab, scale, fields, device):
    rng = torch.Generator().manual_seed(vocab)
    for temperature in (1.0, 0.6, 2.5):
        scores = torch.randn(1, vocab, generator=rng) * scale + 11
        edges = intervals(scores[0], temperature, **fields)
        tokens = drawn(scores.to(device).expand(64, -1), temperature, **fields).tolist()
        for position, token in enumerate(tokens):
            u = uniform(5, position)
            assert edges[token] - 1e-5 <= u <= edges[token + 1] + 1e-5
            assert edges[token] < edges[token + 1], "a token that the filters keep"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(fields, device):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    scores = torch.randn(8, 60, generator=torch.Generator().manual_seed(4)) * 0.7
    warpers = []
    if "top_k" in fields:
        warpers.append(transformers.TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        warpers.append(transformers.TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        warpers.append(transformers.MinPLogitsWarper(fields["min_p"]))
    expected = scores
    for warper in warpers:
        expected = warper(None, expected)
    for row, kept in zip(scores, expected, strict=True):
        wanted = set(kept.isfinite().nonzero()[:, 0].tolist())
        # So many draws that none of those is missed: each has a probability of 0.001 and more.
        assert set(drawn(row.to(device).expand(20_000, -1), **fields).tolist()) == wanted


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_stay_together(device):
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.5, -math.inf]], device=device).expand(500, -1)
    for fields in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert set(drawn(scores, **fields).tolist()) == {1, 2, 3}
    assert set(drawn(scores).tolist()) == {0, 1, 2, 3, 4}
    flat = torch.full((300, 70_000), 3.25, device=device)
    for fields in ({"top_k": 9}, {"top_p": 0.2}):
        assert torch.equal(drawn(flat, **fields), drawn(flat))


@pytest.mark.parametrize("device", DEVICES)
def test_a_tiny_temperature_takes_the_likeliest(device):
    scores = torch.randn(50, 200, device=device) * 1e30
    for temperature in (1e-30, 1e-45, 0.0):
        assert torch.equal(drawn(scores, temperature), scores.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_splitmix(device):
    """Equal scores of 2^16 tokens show a number's upper bits, also of seeds that no int64 holds."""
    golden = 0x9E3779B97F4A7C15
    flat = torch.zeros(1, 1 << 16, device=device)
    for seed in (0, 1, 2**63 + 5, 2**70 + 3):
        key = mix((seed + 1) * golden % 2**64)
        for position in (0, 1, 77, 10**6, 2**31 - 1):
            expected = int(uniform(key, position) * (1 << 16))
            assert drawn(flat, key=seed_key(seed), first=position).item() == expected


def test_numbers_are_uniform_in_seed_and_position():
    flat = torch.zeros(100, 1 << 10)
    grid = torch.stack([drawn(flat, key=seed_key(seed)) for seed in range(100)]) / 1024 - 0.5
    assert torch.histc(grid, 20, -0.5, 0.5).sub(500).abs().max() < 5 * math.sqrt(500)
    for other in (grid.roll(1, 0), grid.roll(1, 1)):  # neighbours in seed and in position
        assert abs((grid * other).mean() * 12) < 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 5003])
def test_a_row_does_not_know_the_others(vocab, device):
    rng = torch.Generator().manual_seed(3)
    scores = (torch.randn(7, vocab, generator=rng) * 3).to(device)
    settings = torch.tensor([[1, 1, 0], [0.7, 0.9, 0], [2, 0.5, 0.1]] * 2 + [[1, 1, 0.01]])
    top_k, keys, lengths = (torch.randint(1, 60, (7,), generator=rng) for _ in range(3))
    rows = (scores, settings, top_k, keys, lengths)
    together = reported(*rows)
    for row in range(7):
        assert reported(*(x[row : row + 1] for x in rows)).item() == together[row]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 8200, 32001, 152064])
def test_temperature_0_is_argmax(vocab, dtype, device):
    scores = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    scores[1] = scores[1].round()  # many are the largest
    scores[2] = torch.where(torch.arange(vocab) % 2 == 1, 0.0, -0.0)
    scores[3] = -math.inf
    scores[3, vocab // 2] = -3
    scores[4, -1] = scores[4].max()
    first = [row.tolist().index(row.max().item()) for row in scores]
    for fields in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.5}):
        assert drawn(scores.to(device), 0.0, **fields).tolist() == first


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [33, 8200, 32001])
def test_16_bits_draw_as_32_do(vocab, dtype, device):
    rng = torch.Generator().manual_seed(vocab)
    scores = (torch.randn(30, vocab, generator=rng) * 3).to(dtype).to(device)
    for fields in FILTERS:
        assert torch.equal(drawn(scores, 0.8, **fields), drawn(scores.float(), 0.8, **fields))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 7, 8199, 8200])
def test_what_is_not_finite_is_reported(bad, place, device):
    scores = torch.randn(4, 8201, device=device)
    scores[1] = bad
    scores[2, place] = bad
    masked = bad == -math.inf
    for temperature in (0.0, 1.0):
        for fields in FILTERS:
            tokens = drawn(scores, temperature, **fields).tolist()
            assert tokens[1] == -1 and (tokens[2] >= 0) == masked
            assert min(tokens[0], tokens[3]) >= 0


@pytest.mark.gpu
def test_gpu_reports_in_pinned_memory():
    scores = torch.randn(3, 1000, device="cuda")
    settings = torch.tensor([[0.0, 1, 0]], device="cuda").repeat(3, 1)
    ints = [torch.ones(3, dtype=torch.int32, device="cuda") for _ in range(4)]
    keys = torch.ones(3, dtype=torch.int64, device="cuda")
    reported = torch.zeros(3, dtype=torch.int32, pin_memory=True)
    draw(scores, settings, ints[0], keys, *ints[1:], reported)
    torch.cuda.synchronize()
    assert torch.equal(reported, scores.argmax(-1).int().cpu())
    with pytest.raises(ValueError, match="draw: reported must be on"):
        draw(scores, settings, ints[0], keys, *ints[1:], torch.zeros(3, dtype=torch.int32))


def test_arguments_are_checked():
    scores = torch.zeros(2, 5)
    settings, keys = torch.ones(2, 3), torch.ones(2, dtype=torch.int64)
    top_k, *others = (torch.ones(2, dtype=torch.int32) for _ in range(5))
    with pytest.raises(ValueError, match="draw: scores must have dtype float32, float16 or bf"):
        draw(scores.int(), settings, top_k, keys, *others)
    with pytest.raises(ValueError, match="draw: settings must have 6 elements"):
        draw(scores, settings[:1], top_k, keys, *others)
    with pytest.raises(ValueError, match="draw: lengths must not share memory with running"):
        draw(scores, settings, top_k, keys, others[0], *others[:3])
    with pytest.raises(ValueError, match=r"draw: scores: expected rows of 1 to 2\^18|rows of 1 to"):
        draw(torch.zeros(2, (1 << 18) + 1), settings, top_k, keys, *others)
    draw(scores[:0], settings[:0], top_k[:0], keys[:0], *(x[:0] for x in others))
