"""The mechanism of settings: sections, recipes with bases, dotted overrides, help, and errors that name the nearest.

It knows no program. Each composes a `ProgramSettings` of `Section`s that are defined beside the code that reads them
(train/settings.py, rl/settings.py, ...) and checks the whole with a function of its own (train/checks.py, ...). Nothing
here imports torch, so that `--help` and a wrong key answer at once.
"""

import copy
import difflib
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class SettingsError(ValueError):
    """The settings cannot work; the message lists what was got, what was needed and what to change."""


class Section(BaseModel):
    """A section of the settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    former_names: ClassVar[dict[str, str]] = {}  # old key -> today's; read still, with a note


class ProgramSettings(Section):
    """All settings of one program."""

    program: ClassVar[str]  # as it is started, such as launch/midtrain.py
    takes_recipe_name: ClassVar[str] = ""  # the setting that a recipe's file name is for where it gives none


Kind = TypeVar("Kind", bound=ProgramSettings)


class Findings:
    """What a check finds: problems, which are told all at once, and notes on what is worth knowing."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def conclude(self) -> list[str]:
        """The notes; one SettingsError where there are problems."""
        if self.problems:
            raise SettingsError("\n".join(self.problems))
        return self.notes


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    kind: type[Kind],
    recipe: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    others: Collection[type[ProgramSettings]] = (),
    notes: list[str] | None = None,
) -> Kind:
    """A program's settings from a recipe: its bases, then itself, then `a.b=c` overrides whose values are YAML.

    Without a recipe the overrides change the defaults. `base:` names one recipe or a list of them, relative to the
    recipe that says so; later ones win, mappings are merged and lists replaced.

    others: the settings of other programs. Theirs are an error that says whose they are, but in a base, which several
    programs may share: there they are left out. notes: takes a line for these, and for keys under a former name.
    Raises SettingsError for a file that cannot be read, a cycle of bases, an unknown key (naming the nearest valid one)
    and a value of the wrong type (naming field, got and needed).
    """
    reader = _Reader(kind, others, [] if notes is None else notes)
    raw = reader.recipe(Path(recipe)) if recipe else {}
    for override in overrides:
        reader.apply(raw, override)
    if recipe and kind.takes_recipe_name:
        section, name = kind.takes_recipe_name.split(".")
        place = raw.setdefault(section, {})
        if isinstance(place, dict) and not place.get(name):
            place[name] = Path(recipe).stem
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(_describe(e) for e in error.errors())) from error


def dump(settings: ProgramSettings) -> str:
    """The resolved settings as a YAML recipe that `load` reads back as an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=120)


class _Reader:
    """Reads recipes and overrides of one program into nested dicts whose every key is a setting of it."""

    def __init__(self, kind: type[ProgramSettings], others: Collection[type[ProgramSettings]], notes: list[str]):
        self.kind, self.notes = kind, notes
        self.others = [other for other in others if other is not kind]

    def recipe(self, path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
        """A recipe merged onto its bases; `readers`: those that named it as theirs."""
        path = path.resolve()
        if path in readers:
            chain = " -> ".join(str(p) for p in [*readers[readers.index(path) :], path])
            raise SettingsError(f"recipes are each other's base: {chain}")
        own = _read_yaml(path)
        bases = own.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise SettingsError(f"{path}: base={bases!r}; needed: a recipe's path or a list of them")
        left_out: list[str] = []
        own = self._known(own, self.kind, (), str(path), left_out if readers else None)
        if left_out:
            owners = self._owners_text(left_out[0].split("."))
            self.notes.append(f"{path}, a base: {', '.join(left_out)} left out, settings of {owners}")
        merged: dict[str, Any] = {}
        for base in bases:
            merged = _merge(merged, self.recipe(path.parent / base, (*readers, path)))
        return _merge(merged, own)

    def apply(self, raw: dict[str, Any], override: str) -> None:
        """Change `raw` as `a.b=value` says; a number in the name is a place in a list that is there."""
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise SettingsError(f"{override!r} is no override; needed: section.name=value, such as train.steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise SettingsError(f"{override!r}: the value is not YAML: {error}") from error
        nested = self._known(_nest(name.split("."), value), self.kind, (), "command line", None)
        parts: list[str] = []
        for part in name.split("."):
            if isinstance(nested, list):
                parts, nested = [*parts, part], nested[0]
            else:
                ((key, nested),) = nested.items()  # under today's name
                parts.append(key)
        place: Any = raw
        for depth, part in enumerate(parts[:-1]):
            place = _step_into(place, part, ".".join(parts[: depth + 1]))
        _assign(place, parts[-1], nested, name)

    def _known(
        self, raw: Any, model: type[Section], path: tuple[str, ...], source: str, left_out: list[str] | None
    ) -> Any:
        """`raw` under today's names, without other programs' settings where these may be left out.

        Refuses the first key that is no setting, naming the nearest that is, or whose it is.
        """
        if not isinstance(raw, dict):
            return raw  # a wrong type: pydantic reports it
        known = {}
        for given, value in raw.items():
            key = model.former_names.get(str(given), given)
            name = (*path, str(key))
            if key != given:
                self._rename((*path, str(given)), name, key in raw, source)
            field = model.model_fields.get(str(key))
            if field is None:
                self._refuse(name, value, source, left_out)
                continue
            nested = _section_of(field.annotation)
            if nested is None:
                known[key] = value
            elif isinstance(value, list):
                known[key] = [
                    self._known(element, nested, (*name, str(index)), source, left_out)
                    for index, element in enumerate(value)
                ]
            else:
                known[key] = self._known(value, nested, name, source, left_out)
        return known

    def _rename(self, former: tuple[str, ...], name: tuple[str, ...], both: bool, source: str) -> None:
        old, new = ".".join(former), ".".join(name)
        if both:
            raise SettingsError(f"{source}: {old} is the former name of {new}, and both are given; keep {new}")
        self.notes.append(f"{source}: {old} is now called {new}")

    def _refuse(self, name: tuple[str, ...], value: Any, source: str, left_out: list[str] | None) -> None:
        """Raise for a key that is no setting of this program, unless it is another's and may be left out."""
        foreign = any(_has(other, _nest(name, value)) for other in self.others)
        if foreign and left_out is not None:
            left_out.append(".".join(name))
            return
        while isinstance(value, dict) and value:  # name a setting, not just its section
            key, value = next(iter(value.items()))
            name = (*name, str(key))
        dotted = ".".join(name)
        if foreign:
            raise SettingsError(
                f"{source}: {dotted} is a setting of {self._owners_text(name)}, which {self.kind.program} does not have"
            )
        raise SettingsError(f"{source}: there is no setting {dotted}; nearest: {self._nearest(dotted)}")

    def _owners_text(self, name: Sequence[str]) -> str:
        return " and ".join(other.program for other in self.others if _has(other, _nest(name, None)))

    def _nearest(self, name: str) -> str:
        """The valid dotted name most like `name`; one in another section with the same last part comes first."""
        if "." not in name:
            return difflib.get_close_matches(name, list(self.kind.model_fields), n=1, cutoff=0.0)[0]
        section = name.split(".")[0]
        # in a section that only another program has, that one's
        owner = next((o for o in [self.kind, *self.others] if section in o.model_fields), self.kind)
        names = [dotted for dotted, _ in walk_fields(owner)]
        same_leaf = [dotted for dotted in names if dotted.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        nearest = difflib.get_close_matches(name, same_leaf or names, n=1, cutoff=0.0)[0]
        return nearest if owner is self.kind else f"{nearest}, a setting of {owner.program}"


def _has(model: type[Section], raw: Any) -> bool:
    """Is every key of the nested `raw` a setting of this program, by today's or a former name?"""
    if not isinstance(raw, dict):
        return True
    for given, value in raw.items():
        field = model.model_fields.get(model.former_names.get(str(given), str(given)))
        if field is None:
            return False
        nested = _section_of(field.annotation)
        elements = value if isinstance(value, list) else [value]
        if nested is not None and not all(_has(nested, element) for element in elements):
            return False
    return True


def _nest(parts: Sequence[str], value: Any) -> Any:
    """`value` at a dotted name's place in dicts, and lists of one element where a part is a number."""
    for part in reversed(parts):
        value = [value] if part.isdigit() else {part: value}
    return value


def _merge(below: Any, above: Any) -> Any:
    """Mappings are merged key by key; anything else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def _step_into(place: Any, part: str, name: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, name)]
    if not isinstance(place.get(part), dict | list):
        place[part] = {}
    return place[part]


def _assign(place: Any, part: str, value: Any, name: str) -> None:
    if isinstance(place, list):
        place[_index(place, part, name)] = value
    else:
        place[part] = _merge(place.get(part), value)


def _index(place: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise SettingsError(f"{name}: the list has {len(place)} elements, 0 to {len(place) - 1}")
    return int(part)


def _describe(error: Any) -> str:
    # pydantic adds parts such as "list[int]" for the members of a union
    name = ".".join(part for part in map(str, error["loc"]) if part.isidentifier() or part.isdigit())
    if error["type"] == "missing":
        return f"{name} is not set; needed: a value in the recipe or {name}=... on the command line"
    message = error["msg"].removeprefix("Value error, ")
    # What a section's own rule says names its settings: all that the section holds would bury it.
    got = "" if error["type"] == "value_error" and isinstance(error["input"], dict) else f"={error['input']!r}"
    return f"{name}{got}: {message[0].lower()}{message[1:]}"


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 1e-10 is a number, `off` and `no` are words; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingsError(f"cannot read recipe {path}: {error.strerror}{_similar(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise SettingsError(f"{path} holds a {type(found).__name__}; needed: sections such as `train:`")
    return found


def _similar(path: Path) -> str:
    recipes = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, recipes, n=1)
    return f"; nearest there: {nearest[0]}" if nearest and not path.exists() else ""


# --- help -------------------------------------------------------------------------------------------------------------


def walk_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted name, field); elements of a list are called <n>."""
    for key, field in model.model_fields.items():
        name = f"{prefix}{key}"
        nested = _section_of(field.annotation)
        in_list = nested is not None and nested is not field.annotation
        if nested is None or in_list:
            yield name, field
        if nested is not None:
            yield from walk_fields(nested, f"{name}.<n>." if in_list else f"{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    """The section behind a field: a model, or the model a list is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) is list:
        return _section_of(typing.get_args(annotation)[0])
    return None


def help_text(kind: type[ProgramSettings]) -> str:
    """Every setting with its dotted name, type, default and meaning, section by section."""
    lines = []
    for section, field in kind.model_fields.items():
        model = _section_of(field.annotation)
        lines.append(f"{section}: {(model.__doc__ or '').splitlines()[0]}" if model else f"{section}:")
        for name, entry in walk_fields(model, f"{section}.") if model else [(section, field)]:
            lines.append(f"  {name} ({_type_name(entry.annotation)}{_default_text(entry)})")
            lines.append(f"      {entry.description}")
        lines.append("")
    return "\n".join(lines)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return ", required" if default is PydanticUndefined else f", default {_plain(default)}"


def _plain(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is list:
        return "list of " + _type_name(args[0])
    if origin is tuple:
        return "[" + ", ".join(_type_name(arg) for arg in args) + "]"
    if annotation is type(None):
        return "null"
    if origin is dict or issubclass(annotation, BaseModel):
        return "mapping"
    return annotation.__name__
