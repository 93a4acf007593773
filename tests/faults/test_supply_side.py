"""Faults 49 to 54: what the code may never do, looked up in its syntax trees, and commands that would show it."""

from __future__ import annotations

import ast
import getpass
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import command, contents
from offline_commands import HOST

from megatron_qwen.errors import ConfigError

ROOT = Path(__file__).parents[2]
CODE = ("megatron_qwen", "kernels", "examples", "csrc", "requirements", "setup.py")
NATIVE = (".cpp", ".cu", ".cuh", ".h", ".hpp", ".cc")
SCRIPTS = (".sh", ".sbatch", "Makefile", ".cmake", "CMakeLists.txt")
TOKEN = "hf_SeCrEtSeCrEtSeCrEtSeCrEtSeCrEt0123"
USER = "somebody-private"


def files(*suffixes: str) -> list[Path]:
    places = [ROOT / name for name in CODE]
    found = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [path for path in found if path.is_file() and path.name.endswith(suffixes)]


def dotted(node: ast.AST) -> str:
    """Return the name that a call goes to, such as "yaml.safe_load"; "" for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(node: ast.AST | None) -> bool:
    """Whether an argument can be true: a constant that is, or anything that is no constant."""
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def trusts_remote_code(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.replace("-", "_").strip("_") == "trust_remote_code"
    return isinstance(node, ast.keyword) and node.arg == "trust_remote_code"


def loads_yaml_unsafely(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "yaml" and any("safe" not in alias.name for alias in node.names)
    return isinstance(node, ast.Attribute) and dotted(node).startswith("yaml.") and node.attr in YAML_UNSAFE


YAML_UNSAFE = {
    *("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"),
    *("Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader", "dump", "Dumper"),
}
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn")


def starts_a_shell(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = dotted(node.func)
    if name in SHELLS or name.endswith("create_subprocess_shell") or name in ("eval", "exec"):
        return True
    return is_true(keywords(node).get("shell"))


def unpacks_archives(node: ast.AST) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return "tarfile" in names or "unpack_archive" in names
    return isinstance(node, ast.Attribute) and node.attr in ("extract", "extractall", "unpack_archive")


def unpickles_without_care(node: ast.AST) -> bool:
    """`pickle.load` and full `torch.load` and `np.load`; a subclass of an unpickler has its allow-list."""
    if not isinstance(node, ast.Call):
        return False
    name, given = dotted(node.func), keywords(node)
    if name in ("pickle.load", "pickle.loads", "cPickle.load", "pickle.Unpickler", "dill.load", "joblib.load"):
        return True
    if name == "torch.load":
        value = given.get("weights_only")
        return not (isinstance(value, ast.Constant) and value.value is True)
    return name in ("np.load", "numpy.load") and is_true(given.get("allow_pickle"))


RULES: dict[str, tuple[Callable[[ast.AST], bool], str]] = {
    "49 trust_remote_code": (trusts_remote_code, "AutoModel.from_pretrained(x, trust_remote_code=flag)"),
    "51 yaml": (loads_yaml_unsafely, "import yaml; yaml.load(x, Loader=yaml.Loader)"),
    "52 shell": (starts_a_shell, "import subprocess; subprocess.run(x, shell=True)"),
    "53 archives": (unpacks_archives, "import zipfile; zipfile.ZipFile(x).extractall()"),
    "12 pickle": (unpickles_without_care, "import torch; torch.load(x)"),
}
# Where a rule is broken for a reason: (rule, file) -> the reason.
EXCEPTIONS = {
    ("12 pickle", "megatron_qwen/testing/ranks.py"): "what a rank of the same test wrote a moment ago",
    ("12 pickle", "megatron_qwen/testing/forked.py"): "what a rank of the same test wrote a moment ago",
    ("12 pickle", "megatron_qwen/parallel/stand_in.py"): "hands on the arguments of somebody else's torch.load",
}


@pytest.fixture(scope="module")
def broken() -> dict[str, dict[str, list[int]]]:
    """By rule and file, the lines that break the rule."""
    sources = files(".py", ".pyi")
    assert len(sources) > 100
    found: dict[str, dict[str, list[int]]] = {name: {} for name in RULES}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in (name for name, (rule, _) in RULES.items() if rule(node)):
                lines = found[name].setdefault(str(path.relative_to(ROOT)), [])
                lines.append(getattr(node, "lineno", 0))
    return found


@pytest.mark.parametrize("name", RULES)
def test_code_keeps_the_rules(broken: dict[str, dict[str, list[int]]], name: str) -> None:
    rule, planted = RULES[name]
    assert any(rule(node) for node in ast.walk(ast.parse(planted))), "the rule finds what it is for"
    excepted = {file for each, file in EXCEPTIONS if each == name}
    assert {file: lines for file, lines in broken[name].items() if file not in excepted} == {}
    assert excepted <= set(broken[name]), "an exception that is needed no longer"


def test_49_scripts_and_flags_do_not_trust_remote_code() -> None:
    assert [str(path) for path in files(*SCRIPTS) if "trust" in path.read_text(encoding="utf-8").lower()] == []
    assert "trust" not in command("flags", "qwen2.5-0.5b").out


def test_49_code_that_comes_with_a_model_is_not_run(single: Path, tmp_path: Path) -> None:
    (single / "modeling_qwen.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((single / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_qwen.Config", "AutoModelForCausalLM": "modeling_qwen.Model"}
    (single / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert command("convert", "import", single, tmp_path / "mg").code == 0
    assert command("convert", "export", tmp_path / "mg", tmp_path / "back").code == 0
    assert command("convert", "verify", single, tmp_path / "back").code == 0
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert not list(tmp_path.rglob("modeling_qwen.py"))[1:]


def test_52_native_code_starts_no_process() -> None:
    sources = files(*NATIVE)
    assert len(sources) > 3
    calls = ("system(", "popen(", "execv", "dlopen(")
    assert [(str(path), call) for path in sources for call in calls if call in path.read_text(encoding="utf-8")] == []


EVIL_YAML = {
    "object": "out: !!python/object/apply:os.system ['touch {}']",
    "new": "out: !!python/object/new:os.system ['touch {}']",
    "name": "out: !!python/name:os.system",
    "module": "out: !!python/module:os",
    "tuple": "out: !!python/tuple [a, b]",
    "deep": "[" * 100_000,
    "deep mapping": "{a: " * 20_000,
}


@pytest.mark.parametrize("name", EVIL_YAML)
@pytest.mark.parametrize("how", ["recipe", "set"])
def test_51_hostile_yaml_is_one_error_and_runs_nothing(tmp_path: Path, name: str, how: str) -> None:
    text = EVIL_YAML[name].replace("{}", str(tmp_path / "ran"))
    (tmp_path / "recipe.yaml").write_text(text)
    arguments = (
        ["--recipe", tmp_path / "recipe.yaml"] if how == "recipe" else ["--set", "out=" + text.partition(" ")[2]]
    )
    if how == "set":
        arguments += ["--set", "schedule.steps=nonsense"]
    ended = command("train", "pretrain", *arguments)
    assert ended.code == ConfigError.exit_code, ended
    assert "megatron-qwen: ConfigError: " in ended.err
    assert len(ended.err) < 10_000
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def private_words(folder: Path) -> dict[str, bytes]:
    """What must be in no file that we write."""
    names = {getpass.getuser(), os.environ.get("USER", "")}
    words = {
        "folder": str(folder),
        "host": HOST,
        "true host": socket.gethostname(),
        "token": TOKEN,
        "user": USER,
        "home": str(Path.home()),
    }
    words |= {f"user {name}": name for name in names if len(name) > 4}
    return {what: word.encode() for what, word in words.items() if len(word) > 4}


def leaks(folder: Path, words: dict[str, bytes]) -> list[tuple[str, str]]:
    found = [(name, what) for name, raw in contents(folder).items() for what, word in words.items() if word in raw]
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return found + [(name, what) for name in names for what, word in words.items() if word in name.encode()]


def run_commands(folder: Path, *commands: str) -> str:
    """Run the commands one after another in one process of their own, in `folder`; return what they print."""
    environment = {
        **os.environ,
        **{"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN, "USER": USER, "LOGNAME": USER},
        **{"OMP_NUM_THREADS": "1", "MEGATRON_QWEN_LOG": "INFO", "PYTHONPATH": str(ROOT)},
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("offline_commands.py"), *commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


TEXT = "the quick brown fox jumps over the lazy dog, and so do all the others\n" * 40
DATA = (
    "data tokenizer text --vocab-size 300 --out out/tok",
    "data prepare text --tokenizer out/tok --out out/data/text --workers 1",
)
CONVERT = (
    "convert import hf out/mg",
    "convert import hf out/legacy --ckpt-format torch --tp 2 --pp 2",
    "convert reshard out/legacy out/again --allow-pickle",
    "convert export out/mg out/back --max-shard-size 200KB",
    "convert verify hf out/mg",
    "convert verify out/back out/back --manifest",
)
TRAIN = (
    "train pretrain --model tiny --data out/data/text --tokenizer out/tok --out out/run --nproc 1 --steps 2 "
    "--seq-length 32 --micro-batch-size 1 --global-batch-size 2",
    "convert export out/run out/trained",
    "generate out/trained --prompt the --max-new-tokens 2 --greedy",
)


@pytest.fixture(scope="module")
def workplace(templates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every kind of output was made by commands with relative paths, offline and with a token around."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "hf").symlink_to(templates / "single")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(TEXT)
    (folder / "out").mkdir()
    (folder / "printed.txt").write_text(run_commands(folder, *DATA, *CONVERT, *TRAIN))
    return folder


@pytest.mark.multirank
def test_50_no_token_path_user_or_host_in_what_we_write(workplace: Path) -> None:
    words = private_words(workplace)
    assert {"folder", "host", "token", "user"} <= set(words)
    written = {str(path.relative_to(workplace / "out")) for path in (workplace / "out").rglob("*") if path.is_file()}
    for name in ("mg/release/.metadata", "legacy/release/manifest.json", "back/config.json", "run/metrics.jsonl"):
        assert name in written, sorted(written)
    assert leaks(workplace / "out", words) == []


@pytest.mark.multirank
def test_50_a_leak_would_be_found(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(f"loaded with {TOKEN} by {USER}")
    found = leaks(tmp_path, private_words(workplace))
    assert {what for _, what in found} >= {"token", "user"}


@pytest.mark.multirank
def test_50_nothing_printed_holds_a_token(workplace: Path) -> None:
    printed = (workplace / "printed.txt").read_bytes()
    assert len(printed) > 1000
    words = private_words(workplace)
    assert words["token"] not in printed
    assert words["user"] not in printed


@pytest.mark.multirank
def test_54_no_command_needs_the_network(workplace: Path) -> None:
    """The commands of `workplace` ran with every socket to another machine, and every look-up of a name, refused."""
    printed = (workplace / "printed.txt").read_text()
    assert "offline: 11 commands" in printed
    assert "offline: refused" not in printed


@pytest.mark.parametrize("how", ["connect", "look up", "fetch"])
def test_54_the_block_blocks(tmp_path: Path, how: str) -> None:
    script = Path(__file__).with_name("offline_commands.py")
    attempts = {
        "connect": "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)",
        "look up": "import socket; socket.getaddrinfo('example.org', 80)",
        "fetch": "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=5)",
    }
    code = f"import runpy; runpy.run_path({str(script)!r})['block_network'](); {attempts[how]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    assert "offline: refused" in done.stdout


def test_53_archives_in_a_folder_are_not_unpacked(single: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(single / "weights.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
    assert command("convert", "import", single, tmp_path / "mg").code == 0
    assert not list(tmp_path.rglob("evil.txt"))
    assert not list(tmp_path.rglob("weights.zip"))[1:]
