"""Optimizer state in pages: the same bits wherever it lies, moved at any time, under a cap."""

from __future__ import annotations

import warnings

import pytest
import torch
from memory import held_bytes

from halfbyte import _core
from halfbyte.optim import AdamW
from halfbyte.pager import MARGIN, Slab
from halfbyte.pressure import free_memory, total_memory

# Ragged, empty and one-element parameters; several pages; a boundary inside a parameter.
SHAPES = [(300, 77), (1,), (0,), (8192,), (200_001,), (130, 1000), (255,), (64, 4096)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def parameters(device, dtype=torch.float32, shapes=SHAPES, shift=0):
    """Parameters that start `shift` elements past an aligned address."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator).to(dtype)
        memory = torch.zeros(values.numel() + shift, dtype=dtype, device=device)
        view = memory[shift:].view(shape)
        view.copy_(values)
        found.append(torch.nn.Parameter(view))
    return found


def set_grads(params, step, shift=0, holes=False):
    generator = torch.Generator().manual_seed(100 + step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        if holes and grad.numel() > 300:
            flat = grad.view(-1)
            flat[[3, 299]] = torch.tensor([float("nan"), float("inf")]).to(grad)
            for first, factor in [(400, 0.0), (1000, 1e-20), (1600, 1e15)]:
                flat[first : first + 100] *= factor
        if param.dim() == 2:
            grad = grad.t().contiguous().t()
        elif shift:
            grad = torch.cat([grad.new_zeros(shift), grad])[shift:]
        param.grad = None if (index + step) % 5 == 4 else grad


def train(
    device,
    state,
    placement,
    dtype=torch.float32,
    moves=(),
    steps=6,
    shift=0,
    holes=False,
    **options,
):
    """Parameters and state after some steps; `moves` are (step, "evict" or "restore")."""
    params = parameters(device, dtype, shift=shift)
    optimizer = AdamW(params, 1e-2, state=state, placement=placement, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(steps):
        set_grads(params, step, shift, holes)
        for at, move in moves:
            if at == step:
                optimizer.pager.evict(1 << 40) if move == "evict" else optimizer.pager.restore()
        optimizer.step()
        schedule.step()
    states = optimizer.state_dict()["state"]
    return [p.detach().cpu() for p in params], states


def assert_equal(got, expected):
    for a, b in zip(got[0], expected[0], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert got[1].keys() == expected[1].keys()
    for number, state in expected[1].items():
        assert got[1][number].keys() == state.keys()
        for name, value in state.items():
            same = torch.equal(got[1][number][name], value) if name != "step" else True
            assert same and got[1][number]["step"] == state["step"], (number, name)


MOVES = [(1, "evict"), (3, "restore"), (4, "evict"), (5, "restore")]


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "max_grad_norm": 0.3}], ids=["plain", "decay-clip"]
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_results_do_not_depend_on_the_placement(device, state, dtype, options):
    expected = train(device, state, "device", dtype, **options)
    assert_equal(train(device, state, "host", dtype, **options), expected)
    assert_equal(train(device, state, "auto", dtype, MOVES, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "host", "mixed"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_gpu_gives_the_bits_of_the_cpu(state, dtype, shift, placement):
    options = dict(dtype=dtype, shift=shift, holes=state == "8bit", weight_decay=0.01)
    moves = MOVES if placement == "mixed" else ()
    kind = "auto" if placement == "mixed" else placement
    expected = train("cpu", state, "device", **options)
    assert_equal(train("cuda", state, kind, moves=moves, **options), expected)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_half_of_the_frames_may_move(device, state):
    shapes = [(1 << 22,), (1 << 22,), (1 << 22,)] if state == "fp32" else [(1 << 24,), (1 << 23,)]
    results = []
    for moved in (0, 1):
        params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
        optimizer = AdamW(params, 1e-2, state=state)
        optimizer.pager.restore()
        slab = optimizer.pager.slabs[0]
        assert len(slab.core.frames()) >= 2
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.5 + step)
            if moved and step == 1:
                assert optimizer.pager.evict(1) == slab.core.frames()[-1][2]
                assert 0 < optimizer.pager.stats()["host_bytes"] < slab.nbytes
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_dicts_are_equal_whatever_was_moved(device, tmp_path):
    files = []
    for placement, moves in (("device", ()), ("host", ()), ("auto", MOVES)):
        params = parameters(device)
        optimizer = AdamW(params, 1e-2, placement=placement)
        for step in range(6):
            set_grads(params, step)
            if (step, "evict") in moves:
                optimizer.pager.evict(1 << 40)
            optimizer.step()
        path = tmp_path / "optimizer.pt"
        torch.save(optimizer.state_dict(), path)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("placement", ["device", "host", "auto"])
def test_paging_works_after_a_resume(device, placement):
    params = parameters(device)
    first = AdamW(params, 1e-2)
    set_grads(params, 0)
    first.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = AdamW(copies, 1e-2, placement=placement)
    state = first.state_dict()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    second.load_state_dict(state)
    if device.type == "cuda" and placement == "host":
        assert torch.cuda.max_memory_allocated() == before, "the state passed through the GPU"
    if placement == "auto":
        assert second.pager.evict(1 << 40) > 0 or device.type == "cpu"
    for step in range(1, 4):
        set_grads(params, step)
        set_grads(copies, step)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_groups_added_later_have_pages(device):
    params = parameters(device)
    optimizer = AdamW(params[:3], 1e-2)
    optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
    expected = parameters(device)
    groups = [{"params": expected[:3]}, {"params": expected[3:], "lr": 1e-3}]
    reference = torch.optim.AdamW(groups, 1e-2, weight_decay=0.0)
    for step in range(3):
        set_grads(params, step)
        set_grads(expected, step)
        optimizer.step()
        reference.step()
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_too_little_host_memory_is_said_at_construction():
    param = torch.nn.Parameter(torch.ones(1 << 20))
    with pytest.raises(_core.HostMemoryError, match="bytes of host memory are needed.*hint"):
        AdamW([param], placement="host", host_limit=1 << 20)
    AdamW([param], placement="device", host_limit=0)
    assert issubclass(_core.HostMemoryError, MemoryError)


def test_a_group_without_room_leaves_the_optimizer_as_it_was():
    first, small, large = (torch.nn.Parameter(torch.ones(n)) for n in (5000, 10, 2 << 20))
    optimizer = AdamW([first], 1e-2, state="8bit", host_limit=2 << 20)
    before = optimizer.pager.stats()
    with pytest.raises(_core.HostMemoryError):
        # There is room for the small one, whose state has another format.
        optimizer.add_param_group({"params": [small, large]})
    assert len(optimizer.param_groups) == 1 and optimizer.pager.stats() == before
    optimizer.add_param_group({"params": [small]})
    for param in (first, small):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert first[0] < 1 and small[0] < 1 and len(optimizer.state_dict()["state"]) == 2


def test_state_that_finds_no_memory_in_one_piece_stays_on_the_host(device, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(10 << 20, device=device))]
    optimizer = AdamW(params, 1e-2)
    optimizer.pager.evict(1 << 40)
    memory, calls = Slab._memory, []

    def in_pieces(slab, frame):
        calls.append(frame)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory(slab, frame)

    monkeypatch.setattr(Slab, "_memory", in_pieces)
    assert optimizer.pager.restore() == 32 << 20
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    stats = optimizer.pager.stats()
    assert len(calls) == 2 and stats["device_bytes"] == 32 << 20 and stats["host_bytes"] > 0
    assert (params[0] - 0.99).abs().max() < 1e-6


def test_a_bad_placement_is_refused():
    with pytest.raises(ValueError, match="placement"):
        AdamW([torch.nn.Parameter(torch.ones(2))], placement="disk")


def test_the_pager_refuses_what_does_not_fit():
    core = _core.Pager([10, 20], "fp32", True, None, None)
    ones = [torch.ones(10), torch.ones(20)]
    rule = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(ValueError, match="2 entries"):
        core.step(ones[:1], [None], [rule], [0], None, False)
    with pytest.raises(ValueError, match="param 1 must have 20 elements"):
        core.step([ones[0], ones[0]], [None, None], [rule], [0, 0], None, False)
    with pytest.raises(ValueError, match="grad must have dtype"):
        core.step(ones, [ones[0].half(), None], [rule], [0, 0], None, False)
    with pytest.raises(ValueError, match="step must be >= 1"):
        core.step(ones, [None, None], [(*rule[:5], 0)], [0, 0], None, False)
    with pytest.raises(ValueError, match="frame must be one of the pager's"):
        core.demote(7)
    with pytest.raises(ValueError, match="frame must be a frame on the device"):
        core.demote(0)
    with pytest.raises(ValueError, match="memory must be"):
        core.promote(0, torch.empty(12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="moments must be fp32 or 8bit"):
        _core.Pager([1], "4bit", True, None, None)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    params = parameters("cuda")
    optimizer = AdamW(params, 1e-2, placement="host", max_grad_norm=0.3)
    set_grads(params, 0)
    optimizer.step()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        before = torch.cuda.Event()
        before.record()
        for _ in range(5):
            optimizer.step()
        assert not before.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_work_on_another_stream_is_ordered():
    expected = train("cuda", "fp32", "device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = train("cuda", "fp32", "auto", moves=MOVES)
    assert_equal(got, expected)


@pytest.mark.gpu
def test_state_on_the_device_counts_in_torchs_statistics():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    param = torch.nn.Parameter(torch.ones(1 << 23, device="cuda"))
    optimizer = AdamW([param])
    state = optimizer.pager.stats()["state_bytes"]
    assert state == 8 << 23
    assert torch.cuda.memory_allocated() - before >= state + param.nbytes
    assert optimizer.pager.evict(state) == state
    assert torch.cuda.memory_allocated() - before < state
    assert optimizer.pager.restore() == state


@pytest.mark.gpu
def test_where_torchs_optimizer_dies_ours_goes_on(cap):
    cap(1 << 60)  # which lets go of what other tests have left
    cap(torch.cuda.memory_reserved() + (1 << 30))
    param = torch.nn.Parameter(torch.zeros(64 << 20, device="cuda"))
    param.grad = torch.ones_like(param)
    plain = torch.optim.AdamW([param], 1e-2, weight_decay=0.0, foreach=False)
    hog = torch.empty(400 << 20, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        plain.step()
    del plain
    with torch.no_grad():
        param.zero_()
    optimizer = AdamW([param], 1e-2)
    assert optimizer.pager.stats()["host_bytes"] > 0
    optimizer.step()
    # On the host: under the cap there may be no memory to check with.
    assert (param.detach().cpu() + 0.01).abs().max() < 1e-6
    del hog


def test_optimizers_come_and_go_without_a_trace(device):
    alive, gone = [], []
    for _ in range(6):
        params = [torch.nn.Parameter(torch.ones(8 << 20, device=device))]
        optimizer = AdamW(params)
        params[0].grad = torch.ones_like(params[0])
        for _ in range(3):
            optimizer.pager.evict(1 << 40)
            optimizer.step()
            optimizer.pager.restore()
        stats = optimizer.pager.stats()
        if stats["host_bytes"] and free_memory(device) < 2 * MARGIN * total_memory(device):
            pytest.skip("other processes have the device's memory")
        state = stats["state_bytes"]
        alive.append(held_bytes(device))
        del optimizer, params
        gone.append(held_bytes(device))
    for place, left in gone[-1].items():
        counted = [a[place] - b[place] for a, b in zip(alive, gone, strict=True)]
        assert min(counted) > state // 2, f"a state is not seen in the {place}'s memory"
        assert left < gone[1][place] + state // 2, (place, gone)
