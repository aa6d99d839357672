"""What the package as a whole promises: layers, imports without side effects, the right torch, a true README."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from packaging.specifiers import SpecifierSet

from dalle_pytorch.config import CONFIGS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_models_generation_and_text_need_no_training_stack():
    """They import, and sample, with Lightning, Hydra, wandb and web frameworks out of reach."""
    code = """
import sys
for name in ("pytorch_lightning", "hydra", "wandb", "tensorboard", "torchvision", "transformers", "httpx", "requests",
             "emoji", "unidecode", "msgpack", "datasets", "matplotlib", "scipy"):
    sys.modules[name] = None
import torch
from dalle_pytorch import CLIP, DALLE, DiscreteVAE, load, save
vae = DiscreteVAE(image_size=16, num_layers=2, num_tokens=8, codebook_dim=8, hidden_dim=8)
dalle = DALLE(dim=16, vae=vae, num_text_tokens=9, text_seq_len=3, depth=1, heads=1, dim_head=16)
print(tuple(dalle.generate_images(torch.ones(2, 3, dtype=torch.long)).shape))
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 3, 16, 16)"


def test_importing_changes_no_global_state():
    code = """
import torch
from torch.nn.modules import module
state, threads, grad = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
hooks = lambda: {name: list(value.values()) for name, value in vars(module).items() if name.endswith("_hooks")}
before = hooks()
assert "_global_parameter_registration_hooks" in before
import dalle_pytorch, dalle_pytorch.commands.train_dalle, dalle_pytorch.commands.generate
assert hooks() == before
assert torch.equal(state, torch.get_rng_state())
assert (threads, grad) == (torch.get_num_threads(), torch.is_grad_enabled())
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_torch_is_the_one_asked_for_and_torchvision_is_absent():
    (requirement,) = [r for r in PROJECT["project"]["dependencies"] if re.match(r"torch\W", r)]
    assert torch.__version__.split("+")[0] in SpecifierSet(requirement.removeprefix("torch"))
    assert importlib.util.find_spec("torchvision") is None
    nvidia = [d.name for d in importlib.metadata.distributions() if d.name.startswith("nvidia-")]
    assert not nvidia or torch.version.cuda


def test_every_constraint_is_installed_as_pinned():
    """Except extras that are not there; a pin that drifted from the environment would be a lie."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if "==" not in line or line.startswith("#"):
            continue
        name, version = line.split("==")
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            assert importlib.metadata.version(name) == version, name


def test_every_command_is_installed():
    """And under its own name, but for image_from_text, which is min-dalle's."""
    scripts = PROJECT["project"]["scripts"]
    commands = {path.stem for path in (ROOT / "dalle_pytorch/commands").glob("*.py")} - {"__init__", "image_from_text"}
    assert set(scripts) == {f"dalle-{name.replace('_', '-')}" for name in commands} | {"image_from_text"}
    for name, target in scripts.items():
        assert target.startswith(f"dalle_pytorch.commands.{name.removeprefix('dalle-').replace('-', '_')}:")
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("command", ["prepare_data", "train_vae", "train_dalle", "train_clip", "generate", "evaluate"])
def test_commands_explain_themselves_from_any_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / f"{command}.py"), run_name="__main__")
    assert "out" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_readme_names_files_that_exist():
    table = README.split("## Where everything is")[1].split("## Limits")[0]
    for path in re.findall(r"`([\w./]+(?:\.py|/))`", table):
        name = path.rstrip("/")
        assert (ROOT / name).exists() or list((ROOT / "dalle_pytorch").rglob(name)), path


def test_readme_code_for_dalle_pytorch_users_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = [b for b in blocks if "DiscreteVAE(" in b]
    result = run(block)
    assert result.returncode == 0, result.stderr


def one_point(word: str) -> str:
    """The first value of a sweep; anything else as it is."""
    (override,) = OverridesParser.create().parse_overrides([word])
    if not override.is_sweep_override():
        return word
    first = override.value().start if override.is_interval_sweep() else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


def test_readme_commands_name_settings_that_exist():
    """Each command line of the README composes, and each line of settings: their keys are known, their groups exist."""
    commands = re.findall(r"^python (\w+)\.py (.*)$", README, re.MULTILINE)
    settings = re.search(r"```bash\n('prompt=.*?)```", README, re.DOTALL).group(1).splitlines()
    commands += [("generate", line.split(" #")[0].strip()) for line in settings]
    assert len(commands) >= 15
    for name in {name for name, _ in commands}:
        importlib.import_module(f"dalle_pytorch.commands.{name}")  # makes its schema known
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for command, arguments in commands:
            words = [a.strip("'") for a in re.findall(r"'[^']*'|\S+", arguments)]
            compose(command, overrides=[one_point(word) for word in words if word != "-m"])
