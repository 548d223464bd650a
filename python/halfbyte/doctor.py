"""`halfbyte doctor`: what is installed, what it was built for, and why CUDA is or is not used."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from halfbyte import _core

LIBRARIES = (
    "numpy safetensors tokenizers huggingface_hub jinja2 gguf typer rich "
    "matplotlib transformers peft bitsandbytes"
).split()


@dataclass
class Section:
    """A titled list of (name, value) lines; `problems` are shown beneath them in red."""

    title: str
    lines: list[tuple[str, str]]
    problems: list[str] = field(default_factory=list)


def examine() -> list[Section]:
    """Everything the report shows, in its order. Reads the machine, changes nothing."""
    return [_package(), _cuda(), _memory(), _cpu(), _libraries()]


def report() -> None:
    """Prints `examine()` to the terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for section in examine():
        console.print(f"[bold]{section.title}[/bold]")
        for name, value in section.lines:
            console.print(f"  {name:<18} {escape(value)}", soft_wrap=True)
        for problem in section.problems:
            console.print(f"  [bold red]{escape(problem)}[/bold red]", soft_wrap=True)


def _package() -> Section:
    section = Section(
        "halfbyte",
        [
            ("version", _core.__version__),
            ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("torch", f"{torch.__version__} (built for CUDA {torch.version.cuda or 'none'})"),
        ],
    )
    build = _core.cuda_build()
    if build is None:
        section.lines.append(("CUDA kernels", "none in this build"))
        section.problems.append(
            "This build holds no CUDA kernels: nvcc was not found when it was compiled, so every "
            "operation runs on the CPU. Hint: reinstall from source on Linux, without "
            "--no-build-isolation, or with HALFBYTE_NVCC=/path/to/nvcc"
        )
    else:
        targets = ", ".join(_target(arch) for arch in build["archs"])
        section.lines.append(("CUDA kernels", f"{targets} (nvcc {build['nvcc']})"))
    return section


def _target(arch: str) -> str:
    """90a is machine code for sm_90a; compute_80 is PTX for whatever comes later."""
    return f"PTX {arch}" if arch.startswith("compute_") else f"sm_{arch}"


def _cuda() -> Section:
    status = _core.cuda_status()
    section = Section("CUDA", [("driver", _driver()), ("used by default", _default_device(status))])
    if status != "ok":
        section.lines.append(("why not", status))
    if torch.cuda.is_available():
        section.lines += [(f"GPU {i}", _gpu(i)) for i in range(torch.cuda.device_count())]
    return section


def _default_device(status: str) -> str:
    return "yes" if status == "ok" and torch.cuda.is_available() else "no, the CPU is used"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "not found (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return run.stdout.splitlines()[0].strip() if run.stdout.strip() else "no GPU listed"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    arch = f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {arch}, {_gib(free)} free of {_gib(total)}"


def _memory() -> Section:
    available, limit = host_memory()
    lines = [("available", _gib(available)), ("limit", _gib(limit))]
    return Section("Host memory", lines)


def host_memory() -> tuple[int, int]:
    """(available, limit) bytes: the machine's, or the tightest control group's this process is in.

    Page cache that a control group can drop counts as available, as it does for the machine.
    Both are 0 where neither /proc nor sysconf tells them.
    """
    available, limit = _machine_memory()
    for folder in _cgroup_folders():
        bound = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if bound is None or used is None or bound >= limit:
            continue
        limit = bound
        available = min(available, bound - used + _reclaimable(folder / "memory.stat"))
    return max(available, 0), limit


def _machine_memory() -> tuple[int, int]:
    meminfo = _table(Path("/proc/meminfo"))
    if "MemAvailable:" in meminfo:
        return meminfo["MemAvailable:"] * 1024, meminfo["MemTotal:"] * 1024
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0, 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _cgroup_folders(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """The memory control groups of this process (versions 1 and 2), innermost first."""
    folders = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        path = base / inside.lstrip("/")
        folders += [path, *[p for p in path.parents if p.is_relative_to(base)]]
    return folders


def _reclaimable(stat: Path) -> int:
    return _table(stat).get("inactive_file", 0)


def _table(path: Path) -> dict[str, int]:
    """First and second word of each line of a kernel table."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) >= 2 and w[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cpu() -> Section:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"{torch.get_num_threads()} of {cores} usable cores"
    features = ", ".join(_core.cpu_features()) or "none that the kernels use"
    return Section("CPU", [("features", features), ("threads", threads)])


def _libraries() -> Section:
    return Section("Libraries", [(name, _version(name)) for name in LIBRARIES])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
