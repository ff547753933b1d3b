"""Dataclass fields as typed, dotted options: checked one by one, each error one line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse
import yaml

from rl_shift.errors import UserError, nearest

_UNSET: Any = dataclasses.MISSING
HELP = ("--help", "-h")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Option:
    """One field, addressed as `agent.learning_rate`, `tasks.0.updates` or `log_every`."""

    key: str
    hint: Any
    default: Any  # dataclasses.MISSING: none
    help: str
    evaluation: bool = False
    alias: str | None = None  # a second, shorter flag

    @property
    def flag(self) -> str:
        """`--agent.learning_rate`, `--log-every`."""
        return flag_name("--" + self.key)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict


class OneLineParser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def __init__(self, **kwargs: Any) -> None:
        """Keyword arguments as for `jsonargparse.ArgumentParser`."""
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing."""
        raise UserError(" ".join(message.split())) from ex


class UnfilledHelp(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description that shows a file."""


class Parser:
    """Checks values from files and flags against the options' types."""

    def __init__(self, options: Sequence[Option], **kwargs: Any) -> None:
        """Keyword arguments go to the parser that prints the help."""
        self.options = {option.key: option for option in options}
        self.parser = OneLineParser(**kwargs)
        for option in options:
            default = None if option.default is _UNSET else option.default
            names = [option.flag] + ([option.alias] if option.alias else [])
            self.parser.add_argument(*names, type=option.hint, default=default, help=option.help)

    def defaults(self) -> dict[str, Any]:
        """The defaults of the fields that have one."""
        return {k: o.default for k, o in self.options.items() if o.default is not _UNSET}

    def layer(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Typed values of nested plain data, by key; `where` names the file in errors."""
        return {key: self._typed(key, v, where) for key, v in self._leaves(data, "", where)}

    def check(self, data: Mapping[str, Any], where: str) -> None:
        """Refuses unknown keys of nested plain data, without looking at its values."""
        for _ in self._leaves(data, "", where):
            pass

    def flags(self, flags: Iterable[str]) -> dict[str, Any]:
        """Typed values of `--key=value` flags, by key."""
        known = {o.flag: o for o in self.options.values()}
        known |= {o.alias: o for o in self.options.values() if o.alias}
        values = {}
        for flag in flags:
            name, equals, text = flag.partition("=")
            if name not in known:
                raise UserError(f"unknown option {name}{_closest(name, known)}; see --help")
            option = known[name]
            if not equals and option.hint is not bool:
                raise UserError(f"{name} needs a value ({type_text(option.hint)})")
            try:
                space = self.parser.parse_args(
                    [f"{option.flag}={text}" if equals else f"{option.flag}=true"], defaults=False
                )
            except UserError as error:
                raise _wrong_type(name, option, text, "the command line") from error
            values[option.key] = space[option.key]
        return values

    def parts(self, flags: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """The flags without `--key.part=value` of a mapping, and those parts by the mapping's key.

        `--agent.base_config.tau=0.01` changes one entry and leaves the others as a preset has them;
        whoever reads the mapping checks the entry's name and type.
        """
        mappings = {f"{o.flag}.": o.key for o in self.options.values() if _is_mapping(o.hint)}
        left: list[str] = []
        found: dict[str, dict[str, Any]] = {}
        for flag in flags:
            name, equals, text = flag.partition("=")
            prefix = next((p for p in mappings if name.startswith(p)), None)
            if prefix is None:
                left.append(flag)
            elif not equals:
                raise UserError(f"{name} needs a value")
            else:
                entries = found.setdefault(mappings[prefix], {})
                try:
                    entries[name.removeprefix(prefix)] = yaml.safe_load(text)
                except yaml.YAMLError as error:
                    raise UserError(f"{name}: {text!r} is not YAML") from error
        return left, found

    def _leaves(
        self, data: Mapping[str, Any], prefix: str, where: str
    ) -> Iterator[tuple[str, Any]]:
        for name, value in data.items():
            key = f"{prefix}{name}"
            if key in self.options:
                yield key, value
            elif not any(known.startswith(f"{key}.") for known in self.options):
                raise UserError(f"unknown key {key!r} in {where}{_closest(key, self.options)}")
            elif isinstance(value, Mapping):
                yield from self._leaves(value, f"{key}.", where)
            elif value is not None:
                raise UserError(f"{key} in {where} must hold keys and values, not {value!r}")

    def _typed(self, key: str, value: Any, where: str) -> Any:
        option = self.options[key]
        if isinstance(value, bool) and typing.get_origin(option.hint) is Literal:
            words = ("true", "false") if "true" in typing.get_args(option.hint) else ("on", "off")
            value = words[not value]  # YAML 1.1 reads all four words as booleans
        if _is_mapping(option.hint) and isinstance(value, Mapping):
            return dict(value)  # its reader types the entries: a word "1" or "true" stays one
        if value is None and not _takes_none(option.hint):
            raise _wrong_type(key, option, value, where)
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            return self.parser.parse_object(nested, defaults=False)[key]
        except UserError as error:
            raise _wrong_type(key, option, value, where) from error


def _takes_none(hint: Any) -> bool:
    return hint is Any or bool({type(None), None} & {*typing.get_args(hint)})


def options_of(cls: type, prefix: str = "") -> list[Option]:
    """The fields of a dataclass, nested dataclasses flattened with dots."""
    hints = typing.get_type_hints(cls)
    comments = _comments(cls)
    options: list[Option] = []
    for f in dataclasses.fields(cls):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        hint, evaluation = hints[f.name], bool(f.metadata.get("evaluation", False))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            for inner in options_of(hint, f"{prefix}{f.name}."):
                name = inner.key.rpartition(".")[2]
                value = getattr(default, name, inner.default)
                marked = evaluation or inner.evaluation
                options.append(dataclasses.replace(inner, default=value, evaluation=marked))
        else:
            key, text = prefix + f.name, comments.get(f.name, "")
            options.append(Option(key, hint, default, text, evaluation))
    return options


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass from the values whose keys start with `prefix`."""
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            given[f.name] = build(hint, values, f"{key}.")
        elif key in values:
            given[f.name] = values[key]
        else:
            raise UserError(f"{key} has no default: give --{key}")
    return cls(**given)


def asked(
    settings: type[Settings],
    argv: Sequence[str],
    usage: str,
    description: str,
    repeated: Sequence[str] = (),
) -> tuple[list[str], Settings, list[list[str]]] | None:
    """What a command was asked for; None if only for its help, which was printed.

    Args:
        settings: the dataclass of its flags.
        argv: the words after the command.
        usage: of the help.
        description: of the help.
        repeated: flags of no field, which may be given several times.

    Returns:
        The positional words, the settings, and the values of each repeated flag.
    """
    words, flags = split(argv, HELP)
    parser = Parser(options_of(settings), usage=usage, description=description)
    if set(HELP) & set(flags):
        parser.parser.print_help()
        return None
    lists = [taken(flags, name) for name in repeated]
    return words, settings(**(parser.defaults() | parser.flags(flags))), lists


def split(argv: Sequence[str], switches: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Positional words, and flags as `--key=value` (`--key` where no value follows).

    Args:
        argv: the words after the command.
        switches: flags that take no value unless it is the word true or false.
    """
    words, flags = [], []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-") or token == "-":
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        name = flag_name(name)
        if equals:
            flags.append(f"{name}={value}")
        elif rest and not rest[0].startswith("--"):
            takes = name not in switches or rest[0] in ("true", "false")
            flags.append(f"{name}={rest.pop(0)}" if takes else name)
        else:
            flags.append(name)
    return words, flags


def taken(flags: list[str], name: str) -> list[str]:
    """The values of a flag, which is taken out of `flags`."""
    found = [flag for flag in flags if flag.partition("=")[0] == name]
    for flag in found:
        flags.remove(flag)
        if "=" not in flag:
            raise UserError(f"{name} needs a value")
    return [flag.partition("=")[2] for flag in found]


def flag_name(name: str) -> str:
    """The spelling of a flag: `--log_every` is `--log-every`, dotted ones keep underscores."""
    return name if "." in name else name.replace("_", "-")


def type_text(hint: Any) -> str:
    """A type in the words of an error message."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _wrong_type(name: str, option: Option, value: Any, where: str) -> UserError:
    text = type_text(option.hint).replace("typing.", "")
    return UserError(f"{name} in {where} must be {text}, not {value!r}")


def _closest(word: str, known: Iterable[str]) -> str:
    """The nearest match; a name whose last part is the word comes first."""
    known = list(known)
    bare = word.removeprefix("--").replace("-", "_")
    same = [k for k in known if k.rpartition(".")[2] == bare]
    if same:
        return f", did you mean {same[0]!r}?"
    found = nearest(word, known)
    return found or nearest(bare, {k.rpartition(".")[2] for k in known})


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field, inherited ones too: what it means, where it comes from."""
    found: dict[str, str] = {}
    for kind in reversed([one for one in cls.__mro__ if dataclasses.is_dataclass(one)]):
        with suppress(OSError, TypeError):
            source = inspect.getsource(kind)
            found |= {
                m[1]: m[2].strip() for m in re.finditer(r"^\s+(\w+)\s*:.*?#\s*(.+)$", source, re.M)
            }
    return found
