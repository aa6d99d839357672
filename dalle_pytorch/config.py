"""Typed Hydra settings: the decorator of all commands, "did you mean", and errors in one line."""

import contextlib
import difflib
import inspect
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import env_override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from dalle_pytorch.errors import ConfigError, UserError, one_line_errors
from dalle_pytorch.files import append_row

T = TypeVar("T")
log = logging.getLogger(__name__)

CONFIGS = next(
    folder for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
    if (folder / "train_vae.yaml").is_file()
)  # fmt: skip
"""The YAML files: inside the package in a wheel, at the top of a checkout."""
RENAMED: dict[str, str] = {}
"""Settings, or sections, of earlier versions, and what they are called now; the modules of settings add to it."""
WRONG_VALUES: dict[str, str] = {}
"""What to say where a setting is given a value of the wrong type; the modules of settings add to it."""
HYDRA_FLAGS = re.compile(
    "-[hcpricms]|-sc|-cp|-cn|-cd|--(hydra-help|help|version|cfg|resolve|package|run|multirun|shell-completion"
    "|config-path|config-name|config-dir|experimental-rerun|info)"
)
"""The flags that a command has."""
SETTING = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@]*=")
"""How an argument begins that gives a setting."""


class Flag(NamedTuple):
    """What stands here for a flag of another program's command."""

    settings: Sequence[str] = ()
    """Settings that take its value, or settings with theirs, as ``model.stable=true``."""
    remark: str = ""
    """What else there is to say; {} is its value."""

    def arguments(self, value: str | None) -> list[str]:
        """The arguments to type in place of the flag."""
        return [item if "=" in item else argument(item, value or "VALUE") for item in self.settings]


def register(name: str, config_class: type, group: str | None = None) -> None:
    """Make a schema known to Hydra.

    Args:
        name: of a command, whose schema is ``<name>_schema``; or of an option of ``group``.
        config_class: the dataclass.
        group: config group whose options choose among schemas, ``schema/<group>/<name>``.
    """
    if group is None:
        ConfigStore.instance().store(name=f"{name}_schema", node=config_class)
    else:
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=config_class)


def typed(node: DictConfig | ListConfig, cls: type[T]) -> T:
    """The dataclass that a composed node was checked against, built and validated; ``~`` in paths is expanded.

    Args:
        node: what Hydra composed.
        cls: the dataclass it should be.

    Returns:
        An instance; its ``__post_init__`` and those of its sections have run.

    Raises:
        ConfigError: a value is out of range or missing, or ``+key=`` added a key that the dataclass lacks.
        TypeError: the node was composed without a schema, or with another one.
    """
    expand_user(node)
    try:
        value = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}= is missing: this command cannot do without it") from error
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"{error.full_key}: {str(error).splitlines()[0]}; ${{...}} stands for a value, \\${{ for itself"
        ) from error
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(value, cls):
        raise TypeError(f"expected a {cls.__name__} config, got {type(value).__name__}")
    for key in _surplus(value):
        raise ConfigError(unknown_key(key, list(_keys(node))))
    return value


def expand_user(node: Any) -> None:
    """Replace a leading ``~/`` of every text in a composed node, as a shell does where it is not quoted."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    items = node.items_ex(resolve=False) if isinstance(node, DictConfig) else enumerate(node._iter_ex(resolve=False))
    for key, value in list(items):
        if isinstance(value, str) and value.startswith("~/"):
            node[key] = os.path.expanduser(value)
        elif isinstance(value, DictConfig | ListConfig):
            expand_user(value)


def nearest(name: str, names: Sequence[str], *, prefix: str = "") -> str:
    """The names most like a misspelt one, or all of them where none is alike, for an error message."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = [prefix + other for other in (close or names)]
    return f"did you mean {' or '.join(shown)}?" if close else f"there are: {', '.join(shown)}"


def build(section: Mapping[str, Any], name: str, *arguments: Any, **extra: Any) -> Any:
    """Instantiate a third-party object from its ``_target_`` section.

    Args:
        section: ``_target_`` and keyword arguments.
        name: what the section is called, for errors.
        *arguments: positional arguments given by code.
        **extra: keyword arguments given by code; they win over the section's.

    Returns:
        The object.

    Raises:
        ConfigError: no ``_target_``, or an argument it does not take, with the nearest that it does.
    """
    parameters = inspect.signature(target_of(section, name)).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in section:
            if key not in parameters and not key.startswith("_"):
                short = section["_target_"].rpartition(".")[2]
                raise ConfigError(f"{name}.{key} is not an argument of {short}: {nearest(key, list(parameters))}")
    return hydra.utils.instantiate({**section, **extra}, *arguments, _convert_="all")


def target_of(section: Mapping[str, Any], name: str) -> Any:
    """The class or function that ``_target_`` of a section names.

    Raises:
        ConfigError: none is named, or it cannot be imported.
    """
    if "_target_" not in section:
        raise ConfigError(f"{name} needs _target_, the class to build")
    try:
        return hydra.utils.get_object(section["_target_"])
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{name}._target_={section['_target_']} cannot be imported: {error}") from error


def explicit_overrides() -> set[str]:
    """Dotted names of the settings and groups that the command line of this run gives."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {override.key_or_group for override in overrides}


def entry(
    name: str, config_class: type[T], *, flags: Mapping[str, Flag] | None = None
) -> Callable[[Callable[[T], Any]], Callable[[], None]]:
    """Turn ``main(config)`` into a command: ``configs/<name>.yaml``, overrides, sweeps, errors in one line.

    A `UserError` and an error of the system (no such file, disk full) end with one line and exit code 1, settings that
    cannot be with 2. Anything else is a defect and keeps its traceback. ``HYDRA_FULL_ERROR=1`` shows all tracebacks.

    Args:
        name: of the primary YAML file, and of the schema: ``<name>_schema`` in its defaults list.
        config_class: the dataclass that the settings are checked against and turned into.
        flags: those of another program's command, without dashes; who gives one is answered with the setting.

    Returns:
        A decorator; the function that it makes takes no arguments and reads ``sys.argv``. What ``main`` returns is the
        score that a sweeper optimises.
    """
    register(name, config_class)

    def decorate(main: Callable[[T], Any]) -> Callable[[], None]:
        def command() -> None:
            full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
            given = sys.argv
            task = Task(main, config_class, given, full_error)
            run: Callable[[], None] = hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(task)
            try:
                # Hydra raises its errors, and we word them
                with one_line_errors(full=full_error), env_override({"HYDRA_FULL_ERROR": "1"}):
                    sys.argv = arguments_of(given, flags or {})
                    try:
                        run()
                    except (HydraException, OmegaConfBaseException) as error:
                        if full_error:
                            raise
                        raise ConfigError(explain(error, flags or {})) from error
            finally:
                sys.argv = given

        command.__doc__, command.__module__ = main.__doc__, main.__module__
        return command

    return decorate


@dataclass
class Task:
    """What Hydra runs, once or for each point of a sweep, in this process or in one that a launcher starts."""

    main: Callable[[Any], Any]
    config_class: type[Any]
    argv: list[str]
    full_error: bool

    def __post_init__(self) -> None:
        """Stand in for ``main`` where Hydra asks a function for its name and module."""
        self.__name__, self.__module__, self.__doc__ = "main", self.main.__module__, self.main.__doc__

    def __call__(self, node: DictConfig) -> Any:
        """Check the settings and run; of a sweep's point also note score or error."""
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            return self.point(node)
        sys.argv = self.argv
        try:
            with one_line_errors(full=self.full_error):
                return self.main(self.configure(node))
        finally:
            folder = Path(settings.runtime.output_dir)
            if folder != Path.cwd():
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()

    def point(self, node: DictConfig) -> Any:
        """One point of a sweep. An error is raised again: Hydra runs the other points first."""
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        # What Lightning starts the other processes of a training with: this point's command line, not the sweep's.
        given, sys.argv = sys.argv, [*self.argv[:1], *(a for a in self.argv if a.startswith("config=")), *overrides]
        with read_write(settings):  # type: ignore[bad-argument-type]
            settings.run.dir = settings.runtime.output_dir
        log.info("#%s: %s", settings.job.num, " ".join(overrides))
        try:
            score = self.main(self.configure(node))
        except Exception as error:
            log.error("#%s failed: %s", settings.job.num, error)
            raise
        finally:
            sys.argv = given
        if isinstance(score, int | float) and int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            row = {"point": settings.job.num, "score": score, "overrides": " ".join(overrides)}
            append_row(Path(settings.sweep.dir) / "scores.csv", row)
            log.info("#%s: score %.6g", settings.job.num, score)
        return score

    def configure(self, node: DictConfig) -> Any:
        """The typed settings; where Hydra makes a folder for the run, ``out`` is that folder."""
        settings = HydraConfig.get()
        if "out" in node and settings.run.dir != ".":
            node.out = settings.runtime.output_dir
        return typed(node, self.config_class)


def arguments_of(argv: Sequence[str], foreign: Mapping[str, Flag]) -> list[str]:
    """A command line as Hydra reads it.

    ``config=runs/x/config.yaml``, settings that a run wrote, becomes the flags for them; and where no sweep is asked
    for, a launcher takes ``out`` as the folder of its one run.

    Raises:
        ConfigError: flags that there are not; those of ``foreign`` are answered with what stands for them here.
        FileNotFoundError: no such settings.
    """
    check_flags(argv[1:], foreign)
    overrides, flags = [], []
    for item in argv[1:]:
        if item.startswith("config="):
            path = Path(item.removeprefix("config=").strip("'\"")).expanduser().absolute()
            if not path.is_file():
                raise FileNotFoundError(f"config={path} does not exist: give the config.yaml of a run")
            if "defaults" not in (OmegaConf.load(path) or {}):
                raise ConfigError(f"{path} names no defaults: it was written before a run's could be used")
            flags += ["--config-dir", str(path.parent), "--config-name", path.stem]
        else:
            overrides.append(item)
    if any(item.startswith("launcher=") for item in overrides) and not {"-m", "--multirun"} & set(overrides):
        overrides.insert(0, "hydra.sweep.subdir=.")
    return [argv[0], *flags, *overrides]


def check_flags(arguments: Sequence[str], foreign: Mapping[str, Flag]) -> None:
    """Refuse flags that a command has not.

    Args:
        arguments: of a command line.
        foreign: flags of another program.

    Raises:
        ConfigError: names them, and what to type in place of those of ``foreign``.
    """
    found: list[tuple[str, str | None]] = []
    for place, item in enumerate(arguments):
        name, equals, value = item.partition("=")
        if not item.startswith("-") or item == "-" or HYDRA_FLAGS.fullmatch(name):
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else "-"
        taken = not (equals or following.startswith("-") or SETTING.match(following))
        found.append((name, value if equals else following if taken else None))
    answers = [(name, value, foreign.get(name.lstrip("-").replace("-", "_"))) for name, value in found]
    known = [(name, value, flag) for name, value, flag in answers if flag is not None]
    if known:
        flags = " ".join(name for name, _, flag in known if flag.settings)
        settings = " ".join(item for _, value, flag in known for item in flag.arguments(value))
        remarks = [f"{name}: {flag.remark.format(value or 'VALUE')}" for name, value, flag in known if flag.remark]
        raise ConfigError("; ".join([*([f"in place of {flags} give {settings}"] if flags else []), *remarks]))
    if found:
        raise ConfigError(f"{found[0][0]} is no flag: settings are given as name=value, and --help shows them")


def argument(key: str, value: str) -> str:
    """A setting as it is typed in a shell: quoted for Hydra, and once more for the shell, where it has to be."""
    if re.fullmatch(r"[\w./:+-]+", value):
        return f"{key}={value}"
    inner = re.sub(r'(\\*)"', r'\1\1\\"', value)  # backslashes count before a quotation mark only
    tail = "\\" * (len(inner) - len(inner.rstrip("\\")))
    return shlex.quote(f'{key}="{inner}{tail}"')


def explain(error: BaseException, foreign: Mapping[str, Flag]) -> str:
    """Word a composition error of Hydra: the key, what is wrong, the nearest valid names."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: no such option; {nearest(option, list(error.options))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    first_line = str(cause).strip().splitlines()[0]
    if isinstance(error, OverrideParseException):
        return explain_syntax(error.override)
    if first_line.startswith("Ambiguous value"):
        key, _, value = first_line.partition("'")[2].rpartition("'")[0].partition("=")
        return (
            f"{key}={value} may be one text, {argument(key, value)}; a list, {argument_list(key, value)}; "
            "or values to be tried one by one, with the flag -m"
        )
    key = getattr(cause, "full_key", None)
    if not key:
        group = first_line.partition("Could not override '")[2].partition("'")[0]
        return f"{group} is no setting any more; {RENAMED[group]}" if group in RENAMED else first_line
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        root = cause.parent_node._get_root() if isinstance(cause.parent_node, DictConfig) else None
        where = first_line.removeprefix("In '").partition("'")[0] if first_line.startswith("In '") else ""
        if flag := foreign.get(key):
            settings = " and ".join(item if "=" in item else f"{item}=" for item in flag.settings)
            return f"{key} is no setting; " + "; ".join(filter(None, (settings and f"here: {settings}", flag.remark)))
        return unknown_key(key, list(_keys(root))) + (f" (in configs/{where}.yaml)" if where else "")
    return f"{key}: {first_line}" + (f"; {WRONG_VALUES[key]}" if key in WRONG_VALUES else "")


def explain_syntax(override: str) -> str:
    """What is wrong with an argument that Hydra cannot read: almost always its quotation."""
    if not SETTING.match(override):
        return f"{override!r} is no setting: settings are given as name=value, and --help shows them"
    key, _, value = override.partition("=")
    return (
        f"{override} cannot be read: a value with signs or quotation marks is quoted twice, for the shell and within: "
        f"{argument(key, value)}"
    )


def argument_list(key: str, value: str) -> str:
    """A setting that is a list, as it is typed in a shell."""
    return shlex.quote(f"{key}=[{value}]")


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """Message for a setting that does not exist: its new name, names like it beside it, or the same word elsewhere."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"{key} is no setting any more; {new}"
    section, _, leaf = key.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = [name.removeprefix(prefix) for name in keys if name.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name and not name.startswith("_")]
    if not difflib.get_close_matches(leaf, siblings, cutoff=0.6):
        elsewhere = [name for name in keys if difflib.get_close_matches(leaf, [name.rpartition(".")[2]], cutoff=0.8)]
        if elsewhere:
            return f"{key} is no setting; did you mean {' or '.join(elsewhere[:3])}?"
    return f"{key} is no setting; {nearest(leaf, siblings, prefix=prefix)}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a composed node, dotted, but for Hydra's own."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key, value in node.items_ex(resolve=False):
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _surplus(value: Any, prefix: str = "") -> Iterator[str]:
    """Attributes that ``+key=value`` hung on a dataclass beside its fields."""
    names = [item.name for item in fields(value)]
    yield from (prefix + key for key in vars(value) if key not in names)
    for name in names:
        if is_dataclass(getattr(value, name)):
            yield from _surplus(getattr(value, name), f"{prefix}{name}.")


def _run_folder(*, _root_: DictConfig) -> str:
    """``out`` as an absolute path."""
    return os.path.abspath(os.path.expanduser(str(_root_.out)))


def _names_each_point(root: DictConfig) -> bool:
    """Whether ``out`` differs from point to point of a sweep, as out='runs/${hydra:job.num}' does."""
    raw = str(OmegaConf.to_container(root, resolve=False)["out"])  # type: ignore[bad-index]
    return "${" in raw.replace("${now:", "")


def _sweep_folder(now: str, *, _root_: DictConfig) -> str:
    """Folder of a sweep: ``out``, or where that names each point, ``runs/sweeps/<now>`` for what the points share."""
    return os.path.abspath(f"runs/sweeps/{now}") if _names_each_point(_root_) else _run_folder(_root_=_root_)


def _point_folder(*, _root_: DictConfig) -> str:
    """Folder of a point inside that of its sweep: its number; or an absolute path where ``out`` names each point."""
    return _run_folder(_root_=_root_) if _names_each_point(_root_) else str(_root_.hydra.job.num)


def _tasks_per_node(devices: Any) -> int:
    """Processes that a job needs on each node."""
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"a job needs the number of processes per node: set trainer.devices=8, not {devices}")
    return devices


def _paper_attention(depth: int) -> list[str]:
    """Patterns of the paper's layers (Ramesh et al. 2021, appendix B.1): row, column, row, row, ..., conv_like last."""
    layers = ["axial_row", "axial_col", "axial_row", "axial_row"] * (depth // 4 + 1)
    return [*layers[: depth - 1], "conv_like"]


for _name, _resolver in {
    "configs": lambda: str(CONFIGS),
    "tasks_per_node": _tasks_per_node,
    "paper_attention": _paper_attention,
    "when": lambda value, expected, then, otherwise: then if value == expected else otherwise,
    "run_folder": _run_folder,
    "sweep_folder": _sweep_folder,
    "point_folder": _point_folder,
}.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
