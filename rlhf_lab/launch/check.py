"""A configuration against the signatures that it names: keys, types and ranges, before anything is built or loaded.

The constructor's signature is the schema. Every node with a `_target_` is bound to it; nodes that wait for more
arguments (`_partial_`) too, which Hydra itself would only find out when they are called.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from rlhf_lab.types import Count

ALLOWED_TARGETS = ("rlhf_lab.",)
MOST_LISTED = 40
_STRUCTURAL = {"_target_", "_partial_", "_convert_", "_recursive_"}


class BadConfig(ValueError):
    """A configuration that cannot be run; one line per mistake: its key, what was found and what is allowed."""


def root(
    *,
    name: str | None,
    seed: int,
    artifact_seed: int,
    runs_dir: str,
    artifacts: str,
    keep_checkpoints: Count | Literal["all"],
    output: str,
    shrink: Mapping[str, int | Mapping[str, str]],
    sweep: str | None,
    sweeps_dir: str,
    plan: bool | Literal["calibrate"],
    num_processes: Count,
    returns: str | None,
) -> None:
    """The schema of the top-level values; see conf/config.yaml."""


def near(word: str, words: Collection[str]) -> str:
    """`did you mean …?` for a word that is not among the words, or what there is."""
    if close := difflib.get_close_matches(word, words, n=1, cutoff=0.6):
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(sorted(words))}" if len(words) <= MOST_LISTED else "--cfg job shows all keys"


def locate(target: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        BadConfig: it is not the project's own (a configuration must not be able to call anything else), or not there.
    """
    if not target.startswith(ALLOWED_TARGETS):
        raise BadConfig(f"_target_={target} is not allowed; a configuration names parts of rlhf_lab only")
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadConfig(f"_target_={target} does not exist: {error}") from error


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _holds_nodes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_holds_nodes, value.values()))
    return isinstance(value, list) and any(map(_holds_nodes, value))


def _mistakes_of_part(path: str, part: Any, protocol: Any) -> Iterator[str]:
    """What a class lacks of the protocol by which it would be used; what its constructor would set is not seen."""
    if not (inspect.isclass(part) and getattr(protocol, "_is_protocol", False)):
        return
    has = {*dir(part), *(name for base in part.__mro__ for name in inspect.get_annotations(base))}
    wanted = {
        name
        for base in protocol.__mro__
        if getattr(base, "_is_protocol", False)
        for name, kind in {**vars(base), **inspect.get_annotations(base)}.items()
        if not name.startswith("_") and (inspect.isfunction(kind) or get_origin(kind) is ClassVar)
    }
    if wanted - has:
        yield (
            f"{path}: {part.__name__} is not of the kind {protocol.__name__} that is needed here; "
            f"it has no {', '.join(sorted(wanted - has))}"
        )


def _mistakes_of_value(path: str, value: Any, annotation: Any) -> Iterator[str]:
    if value == "???":
        yield f"{path} is missing; set {path}=<value>"
        return
    if _is_node(value) and not value.get("_partial_"):
        yield from _mistakes_of_part(path, locate(value["_target_"]), annotation)
    if _holds_nodes(value):
        return
    if getattr(annotation, "_is_protocol", False):
        yield f"{path}={value!r}: expected a {annotation.__name__}, i.e. a node with a _target_"
        return
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, SchemaError):  # a protocol somewhere in it
        adapter = None
    except TypeError:  # the annotation already carries a configuration
        adapter = TypeAdapter(annotation)
    if adapter is None:
        return
    try:
        # as JSON, strictly: an integer is a number, a list is a tuple, a string is never a number
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f".{part}" for part in problem["loc"] if not isinstance(part, int))
        if problem["type"] == "is_instance_of":  # a part of the program, given as plain data
            yield f"{path}={value!r}: expected a {problem.get('ctx', {}).get('class')}, i.e. a node with a _target_"
        else:
            message = problem["msg"].removeprefix("Input ").replace("should be", "must be")
            yield f"{path}{place}={problem['input']!r}: {message}"


def _mistakes_of_call(
    path: str, arguments: Mapping[str, Any], call: Callable[..., Any], partial: bool
) -> Iterator[str]:
    """What is wrong with calling `call` with these keyword arguments."""
    where = f"{path}." if path else ""
    parameters = inspect.signature(call).parameters
    hints = get_type_hints(call.__init__ if inspect.isclass(call) else call, include_extras=True)
    for key in arguments.keys() - parameters.keys() - _STRUCTURAL:
        yield f"{where}{key} is not a key of {path or 'the configuration'}; {near(key, parameters.keys())}"
    for key, parameter in parameters.items():
        if key in arguments:
            yield from _mistakes_of_value(f"{where}{key}", arguments[key], hints.get(key, Any))
        elif parameter.default is inspect.Parameter.empty and not partial:
            yield f"{where}{key} is missing; set {where}{key}=<value>"


def _mistakes(path: str, value: Any, seen: set[str]) -> Iterator[str]:
    if isinstance(value, Mapping):
        if _is_node(value):
            spelled = json.dumps(value, sort_keys=True)
            if spelled in seen:  # the same node, reached again by interpolation
                return
            seen.add(spelled)
            yield from _mistakes_of_call(path, value, locate(value["_target_"]), bool(value.get("_partial_")))
        for key, entry in value.items():
            yield from _mistakes(f"{path}.{key}" if path else str(key), entry, seen)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from _mistakes(f"{path}[{i}]", entry, seen)


def check_node(path: str, node: Mapping[str, Any]) -> None:
    """Refuse a node with a `_target_` that has a wrong key, type or range.

    Raises:
        BadConfig: with every mistake.
    """
    if mistakes := list(_mistakes(path, node, set())):
        raise BadConfig("\n".join(mistakes))


def check(config: Mapping[str, Any]) -> None:
    """Refuse a resolved configuration with a wrong key, type or range anywhere in it.

    Raises:
        BadConfig: with every mistake.
    """
    schema = inspect.signature(root).parameters
    groups = {key: value for key, value in config.items() if key not in schema}
    mistakes = list(_mistakes_of_call("", {key: config[key] for key in config.keys() & schema}, root, False))
    mistakes += [
        f"{key}={value!r} is not a key of the configuration; {near(key, config.keys() - {key})}"
        for key, value in groups.items()
        if not isinstance(value, Mapping)
    ]
    seen: set[str] = set()
    # the stage comes last: it repeats the groups, and a mistake is named where a person would set it
    for key in sorted(groups, key=lambda key: key == "stage"):
        mistakes += _mistakes(key, groups[key], seen)
    if mistakes:
        raise BadConfig("\n".join(dict.fromkeys(mistakes)))
