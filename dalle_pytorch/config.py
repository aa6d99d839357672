"""From Hydra's YAML and the command line to typed settings; the one decorator of all entry scripts."""

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")

CONFIG_PATH = "pkg://dalle_pytorch.configs"
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError, FloatingPointError)
"""What a person can mend from the message alone; anything else is a defect and keeps its traceback."""


class ConfigError(ValueError):
    """Settings that cannot be: a misspelt key, an unknown option, a wrong type or value."""


def register(name: str, config_class: type) -> None:
    """Make the schema of one entry script known to Hydra, as ``<name>_schema``."""
    ConfigStore.instance().store(name=f"{name}_schema", node=config_class)


def typed(node: DictConfig | ListConfig, cls: type[T]) -> T:
    """The dataclass that a composed node was checked against, built and validated.

    Args:
        node: what Hydra composed.
        cls: the dataclass it should be.

    Returns:
        An instance; its ``__post_init__`` and those of its sections have run.

    Raises:
        ConfigError: a value is out of range, or ``+key=`` added a key that the dataclass lacks.
        TypeError: the node was composed without a schema, or with another one.
    """
    try:
        value = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        found = re.search(r"full_key: (\S+)", str(error))
        raise ConfigError(f"{found[1] if found else error}= is missing: this command cannot do without it") from error
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    if not isinstance(value, cls):
        raise TypeError(f"expected a {cls.__name__} config, got {type(value).__name__}")
    for key in _surplus(value):
        raise ConfigError(_unknown(key, cls))
    return value


def nearest(name: str, names: Sequence[str], *, prefix: str = "") -> str:
    """The names most like a misspelt one, or all of them where none is alike, for an error message."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = [prefix + other for other in (close or names)]
    return f"did you mean {' or '.join(shown)}?" if close else f"there are: {', '.join(shown)}"


def build(section: dict[str, Any], name: str, **extra: Any) -> Any:
    """Instantiate a third-party object from its ``_target_`` section.

    Args:
        section: ``_target_`` and keyword arguments.
        name: what the section is called, for errors.
        **extra: arguments given by code; they win over the section's.

    Returns:
        The object.

    Raises:
        ConfigError: no ``_target_``, or an argument it does not take, with the nearest that it does.
    """
    if "_target_" not in section:
        raise ConfigError(f"{name} needs _target_, the class to build")
    target = hydra.utils.get_object(section["_target_"])
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in section:
            if key not in parameters and not key.startswith("_"):
                short = section["_target_"].rpartition(".")[2]
                raise ConfigError(f"{name}.{key} is not an argument of {short}: {nearest(key, list(parameters))}")
    return hydra.utils.instantiate({**section, **extra}, _convert_="all")


def entry(
    name: str, config_class: type[T], *, unless: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turn ``main(config)`` into a command: ``configs/<name>.yaml``, overrides, short errors.

    Settings that cannot be end with exit code 2, mistakes found later (a missing file, a folder in use) with 1;
    both in one message without a traceback. ``HYDRA_FULL_ERROR=1`` brings the tracebacks back.

    Args:
        name: of the primary YAML file, and of the schema: ``<name>_schema`` in its defaults list.
        config_class: the dataclass that the settings are checked against and turned into.
        unless: overrides that hold unless the command line has one of certain keys, by override.

    Returns:
        A decorator; the function that it makes takes no arguments and reads ``sys.argv``.
    """
    register(name, config_class)

    def decorate(main: Callable[[T], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            with_traceback = os.environ.get("HYDRA_FULL_ERROR")
            full_error = with_traceback == "1"

            def task(node: DictConfig) -> None:
                _set_environment("HYDRA_FULL_ERROR", with_traceback)
                try:
                    main(typed(node, config_class))
                except USER_ERRORS as error:
                    if full_error:
                        raise
                    sys.exit(_complain(error))

            # Hydra prints composition errors itself unless told to raise them; we word them shorter.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            given = sys.argv
            sys.argv = [given[0], *implied(given[1:], unless)]
            command: Callable[[], None] = hydra.main(config_path=CONFIG_PATH, config_name=name, version_base="1.3")(
                _named(task, main)
            )
            try:
                command()
            except (HydraException, OmegaConfBaseException, MissingConfigException) as error:
                if full_error:
                    raise
                sys.exit(_complain(ConfigError(explain(error, config_class))))
            finally:
                sys.argv = given
                _set_environment("HYDRA_FULL_ERROR", with_traceback)

        return run

    return decorate


def implied(arguments: Sequence[str], unless: Mapping[str, Sequence[str]]) -> list[str]:
    """A command line with the overrides of ``unless`` of whose keys it has none.

    They come before its first override: Hydra's parser takes overrides from one place, between its flags.
    """
    given = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
    added = [override for override, keys in unless.items() if not given.intersection(keys)]
    is_override = [("=" in item or item.startswith("~")) and not item.startswith("-") for item in arguments]
    place = is_override.index(True) if any(is_override) else len(arguments)
    return [*arguments[:place], *added, *arguments[place:]]


def explain(error: BaseException, config_class: type) -> str:
    """Word a composition error of Hydra: the key, what is wrong, the nearest valid names."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: no such option; {nearest(option, list(error.options))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = str(cause)
    found = re.search(r"full_key: (\S+)", message)
    first_line = message.strip().splitlines()[0]
    if isinstance(error, OverrideParseException) or first_line.startswith("Ambiguous value"):
        return f"{first_line} (quote values of several words or signs twice: 'prompt=\"a cat, sitting\"')"
    if found is None:
        return first_line
    key = found[1]
    if re.search(r"Key '\S+' (is )?not in ", message):
        where = re.match(r"In '(\S+)':", message)
        siblings = getattr(cause, "parent_node", None)
        known = [str(name) for name in siblings] if isinstance(siblings, DictConfig) else None
        return _unknown(key, config_class, known) + (f" (in configs/{where[1]}.yaml)" if where else "")
    return f"{key}: {first_line}"


def _unknown(key: str, config_class: type, siblings: list[str] | None = None) -> str:
    """Message for a key that is not there: near names beside it, else the same word elsewhere."""
    section, _, leaf = key.rpartition(".")
    keys = list(_dotted(config_class))
    prefix = f"{section}." if section else ""
    if siblings is None:
        siblings = [k.removeprefix(prefix) for k in keys if k.startswith(prefix)]
        siblings = [k for k in siblings if "." not in k]
    if not difflib.get_close_matches(leaf, siblings, cutoff=0.6):
        elsewhere = [k for k in keys if difflib.get_close_matches(leaf, [k.rpartition(".")[2]], cutoff=0.8)]
        if elsewhere:
            return f"{key} is no setting; did you mean {' or '.join(elsewhere[:3])}?"
    return f"{key} is no setting; {nearest(leaf, siblings, prefix=prefix)}"


def _dotted(config_class: type, prefix: str = "") -> Iterator[str]:
    """Every key of a dataclass and of the dataclasses in it, dotted."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        yield prefix + item.name
        for kind in (hints[item.name], *get_args(hints[item.name])):
            if is_dataclass(kind) and isinstance(kind, type):
                yield from _dotted(kind, f"{prefix}{item.name}.")


def _surplus(value: Any, prefix: str = "") -> Iterator[str]:
    """Attributes that ``+key=value`` hung on a dataclass beside its fields."""
    names = [item.name for item in fields(value)]
    yield from (prefix + key for key in vars(value) if key not in names)
    for name in names:
        if is_dataclass(getattr(value, name)):
            yield from _surplus(getattr(value, name), f"{prefix}{name}.")


def _named(task: Callable[[DictConfig], None], main: Callable[..., None]) -> TaskFunction:
    """Give the inner function the module of ``main``, without ``__wrapped__``: Hydra reads both."""
    task.__module__, task.__name__, task.__doc__ = main.__module__, main.__name__, main.__doc__
    return task


def _complain(error: Exception) -> int:
    """Print an error in one line; return the exit code."""
    if isinstance(error, OSError) and error.filename is not None:  # raised by the system, not by us
        error_text = f"{error.strerror}: {error.filename}"
    else:
        error_text = str(error)
    sys.stderr.write(f"error: {error_text}\n")
    return 2 if isinstance(error, ConfigError) else 1


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
