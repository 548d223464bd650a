"""The package as a whole: quick to import, typed as compiled, honest about where it runs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tiny import tiny_folder

import halfbyte
from halfbyte import _core, doctor

ROOT = Path(__file__).resolve().parents[1]
LAZY = (
    "tokenizers jinja2 safetensors huggingface_hub gguf rich typer matplotlib transformers".split()
)
NAMES = """
quantize_4bit dequantize_4bit Linear4bit LoraConfig load finetune TrainConfig optim chat
""".split()


def run_python(code: str) -> str:
    """stdout of `code` in a fresh interpreter."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_adds_at_most_300_ms_to_torch():
    """In processor time, which is the wall clock's but for what else the machine is doing."""
    code = """
import time, torch
start = time.process_time()
import halfbyte
print(time.process_time() - start)
"""
    seconds = statistics.median(float(run_python(code)) for _ in range(5))
    assert seconds <= 0.3


def test_import_leaves_other_libraries_and_cuda_alone():
    code = "import sys, torch; before = set(sys.modules); import halfbyte; print(*sys.modules)"
    assert set(run_python(code).split()) & set(LAZY) == set()
    assert run_python("import halfbyte, torch; print(torch.cuda.is_initialized())") == "False\n"


@pytest.mark.parametrize("name", NAMES)
def test_promised_names_are_there(name):
    assert hasattr(halfbyte, name) and name in halfbyte.__all__


def test_optim_and_generate_are_where_they_are_promised():
    from halfbyte.models import Decoder

    assert halfbyte.optim.AdamW.__name__ == "AdamW"
    assert callable(Decoder.generate)


def test_version_is_the_workspace_s():
    cargo = (ROOT / "Cargo.toml").read_text()
    versions = re.findall(r'^version = "(.+)"', cargo, re.MULTILINE)
    assert [metadata.version("halfbyte")] == versions


def test_package_carries_its_types_and_the_demo_data():
    folder = Path(halfbyte.__file__).parent
    for name in ("py.typed", "_core.pyi", "demo_data/train.jsonl", "demo_data/heldout.jsonl"):
        assert (folder / name).is_file(), name


STUB = ast.parse((Path(halfbyte.__file__).parent / "_core.pyi").read_text())
STUB_FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_stub_lists_what_the_compiled_module_has():
    compiled = {name for name in dir(_core) if not name.startswith("_")}
    classes = {node.name for node in STUB.body if isinstance(node, ast.ClassDef)}
    assert STUB_FUNCTIONS.keys() | classes == compiled
    assert _core.CudaError.__bases__ == (RuntimeError,)
    assert _core.HostMemoryError.__bases__ == (MemoryError,)


def test_stub_lists_the_methods_of_the_pager():
    (pager,) = (one for one in STUB.body if getattr(one, "name", "") == "Pager")
    methods = {one.name for one in pager.body if isinstance(one, ast.FunctionDef)}
    compiled = {name for name in vars(_core.Pager) if not name.startswith("_")}
    assert methods - {"__init__"} == compiled


@pytest.mark.parametrize("name", STUB_FUNCTIONS)
def test_stub_signature_is_the_compiled_one(name):
    def spelled(arguments: ast.arguments) -> str:
        for one in arguments.args:
            one.annotation = None
        return ast.unparse(arguments)

    compiled = ast.parse(f"def f{inspect.signature(getattr(_core, name))}: ...").body[0]
    assert spelled(STUB_FUNCTIONS[name].args) == spelled(compiled.args)


def section(title: str) -> doctor.Section:
    return next(one for one in doctor.examine() if one.title == title)


def test_doctor_tells_version_build_machine_and_libraries(capsys):
    doctor.report()
    shown = capsys.readouterr().out
    assert metadata.version("halfbyte") == halfbyte.__version__ and halfbyte.__version__ in shown
    assert "CUDA kernels" in shown and "driver" in shown and "used by default" in shown
    assert re.search(r"available +\d+\.\d GiB", shown)
    assert re.search(r"threads +\d+ of \d+ usable cores", shown)
    assert metadata.version("tokenizers") in shown


def test_doctor_says_loudly_that_a_build_has_no_kernels(monkeypatch):
    monkeypatch.setattr(doctor._core, "cuda_build", lambda: None)
    assert "holds no CUDA kernels" in section("halfbyte").problems[0]
    build = {"nvcc": "13.0", "archs": ["90a", "compute_80"]}
    monkeypatch.setattr(doctor._core, "cuda_build", lambda: build)
    assert section("halfbyte").problems == []
    assert ("CUDA kernels", "sm_90a, PTX compute_80 (nvcc 13.0)") in section("halfbyte").lines


def test_doctor_says_why_cuda_is_not_used(monkeypatch):
    monkeypatch.setattr(doctor._core, "cuda_status", lambda: "libcuda was not found")
    lines = dict(section("CUDA").lines)
    assert lines["used by default"] == "no, the CPU is used"
    assert lines["why not"] == "libcuda was not found"


def write_group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_host_memory_is_the_tightest_control_group_s(tmp_path, monkeypatch):
    write_group(tmp_path / "outer/inner", "max", 700, 0)
    write_group(tmp_path / "outer", "1000", 700, 100)
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    folders = doctor._cgroup_folders(membership, tmp_path)
    assert folders == [tmp_path / "outer/inner", tmp_path / "outer", tmp_path]
    monkeypatch.setattr(doctor, "_cgroup_folders", lambda: folders)
    assert doctor.host_memory() == (400, 1000)


def test_host_memory_without_groups_is_the_machine_s(monkeypatch):
    monkeypatch.setattr(doctor, "_cgroup_folders", list)
    available, limit = doctor.host_memory()
    assert 0 < available <= limit == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


FORBIDDEN = {
    "environment variables change nothing at run time": r"os\.(environ|getenv)",
    "weights are never unpickled": r"pickle\.loads?\(|weights_only=False",
    "no notes to self": r"\b(TODO|FIXME|XXX)\b",
    "nothing downloads code to run": r"trust_remote_code=True",
}
# The user's cache folder, NO_COLOR, torchrun's variables and cuBLAS' workspace are others'.
READS_ENVIRONMENT = {"cli.py", "demo.py", "world.py", "loop.py"}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_sources_hold_to_the_rules(rule):
    pattern, found = re.compile(FORBIDDEN[rule]), []
    for path in sorted((ROOT / "python").rglob("*.py")):
        if "environ" in rule and path.name in READS_ENVIRONMENT:
            continue
        lines = path.read_text().splitlines()
        found += [
            f"{path.name}:{i}: {line}" for i, line in enumerate(lines, 1) if pattern.search(line)
        ]
    assert found == []


def test_functions_stay_short():
    """Nothing over seventy lines, the docstring not counted."""
    long = []
    for path in sorted((ROOT / "python").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                if length > 70:
                    long.append(f"{path.name}:{node.lineno}: {node.name} has {length} lines")
    assert long == []


README_PYTHON = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", README_PYTHON, ids=["all", "engine"])
def test_readme_s_python_runs(tmp_path, monkeypatch, capsys, code):
    """Each example by itself, as printed, on a tiny random model and two rows."""
    base = tiny_folder(tmp_path / "base", max_position_embeddings=512)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
    code = code.replace("max_steps=100", "max_steps=2")
    (tmp_path / "notes.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert (tmp_path / "notes/adapter/adapter_model.safetensors").is_file() == ("finetune" in code)


def test_readme_lists_the_commands():
    from halfbyte.cli import app

    commands = {info.callback.__name__ for info in app.registered_commands}
    readme = (ROOT / "README.md").read_text()
    assert commands == set(re.findall(r"^\| `halfbyte (\w+)", readme, re.MULTILINE))
