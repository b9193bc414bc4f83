"""Which code a function reaches by name: what its result may hang on, without comments and docstrings."""

import ast
import dis
import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from textwrap import dedent
from types import CodeType, ModuleType
from typing import NamedTuple

import numpy as np

NO_COMPUTE = {"__init__", "__main__", "address", "book", "cli", "cluster", "execution", "figures", "files", "primer",
              "profiles", "provenance", "records", "report", "site", "tracing", "units", "verdicts"}
_FOLDER = Path(__file__).parent


class _Module(NamedTuple):
    """A module's top level. What runs on import and binds no name by itself counts for whoever reaches the module."""

    bound: dict  # name -> the statements that bind it
    imports: dict  # name -> the (module, name) of helpers that it may stand for; name None: the module itself
    always: list  # statements such as an `if`, a loop or a call, and classes that register themselves with Keras


def code(function: Callable) -> dict[str, str]:
    """Return the code that `function` runs, by label: "name" in its own module, "helpers.module.name" in the helpers.

    From its own module, which may be a notebook: functions, classes and plain values that it reaches, closures and
    default arguments included. From the helpers: the definitions reached by name, in turn; a module that is used as a
    value rather than by its attributes counts as a whole. Raises TypeError for a global variable that is neither.
    """
    found, todo, helpers = {}, {function.__name__: function}, set()
    while todo:
        label, value = todo.popitem()
        value, uses = inspect.unwrap(value), {}  # what a tf.function or a class method holds
        if not hasattr(value, "__name__"):
            found[label] = plain(f"global variable {label!r} of {function.__name__}", value)
            continue
        home = getattr(value, "__module__", None)
        if home != function.__module__:
            helpers |= _target(value)
        elif inspect.isfunction(value):
            found[label] = bare(inspect.getsource(value))
            uses = _used(label, value)
            helpers |= _named(ast.parse(found[label]), {name: _target(used) for name, used in uses.items()})
            uses = {name: used for name, used in uses.items() if not isinstance(used, ModuleType)}
        elif inspect.isclass(value):
            found[label] = json.dumps([base.__qualname__ for base in value.__mro__])
            helpers |= {target for base in value.__mro__ for target in _target(base)}
            uses = _members(value)
        todo |= {name: used for name, used in uses.items() if name not in found}
    return found | reached(helpers)


def reached(targets: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Return the code of the helpers that `targets`, pairs (module, name), reach; name None: the whole module."""
    found, todo, seen = {}, set(targets), set()
    while todo:
        target = name, inner = todo.pop()
        path = _FOLDER / f"{name}.py"
        if target in seen or name in NO_COMPUTE or not path.exists():
            continue
        seen.add(target)
        module = _parsed(path.read_text(encoding="utf-8"))
        imported = {(other, "") for targets in module.imports.values() for other, _ in targets}  # they run, too
        todo |= imported | _follow(name, module, module.always)
        if module.always:
            found[f"helpers.{name} on import"] = _text(module.always)
        if inner is None or inner and inner not in module.bound | module.imports:  # say, made by setattr: no telling
            found[f"helpers.{name}"] = _text(chain.from_iterable(module.bound.values()))
            todo |= {(name, each) for each in module.bound} | set().union(*module.imports.values())
        elif inner in module.bound:
            found[f"helpers.{name}.{inner}"] = _text(module.bound[inner])
            todo |= _follow(name, module, module.bound[inner])
        elif inner:
            todo |= module.imports[inner]
    return found


def imported(source: str) -> set[str]:
    """Return the modules of helpers that a module or notebook imports by name, and these in turn; here all count."""
    found, todo = {"__init__"}, [source]
    while todo:
        named = _parsed(todo.pop()).imports.items()
        new = {module for name, targets in named if name != "helpers" for module, _ in targets} - found
        new = {name for name in new if (_FOLDER / f"{name}.py").exists()}
        todo += [(_FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in new]
        found |= new
    return found


def changed(before: dict[str, str], source: str = "") -> list[str]:
    """Return the labels of `before`, label -> digest as `code` and `digests` give it, whose code is another today.

    `source` is the module or notebook that the labels without "helpers." are from: its functions and the plain values
    that are written out in it are compared, what else it has is not.
    """
    targets = (label.removesuffix(" on import").split(".")[1:] for label in before if label.startswith("helpers."))
    now = digests(reached({(names[0], names[1] if names[1:] else None) for names in targets}))
    known = {label for label in before if label.startswith("helpers.")}
    for name, [*_, node] in _parsed(source).bound.items():
        if isinstance(node, ast.FunctionDef):
            now |= digests({name: ast.unparse(node)})
        elif isinstance(node, ast.Assign):
            try:
                now |= digests({name: plain(name, ast.literal_eval(node.value))})
            except (TypeError, ValueError):  # made by a call, say
                continue
        known |= {name} & set(before)
    return sorted(label for label in known if now.get(label) != before[label])


def digests(texts: dict[str, str]) -> dict[str, str]:
    """Return the first digits of the SHA-256 of each text."""
    return {label: hashlib.sha256(text.encode()).hexdigest()[:12] for label, text in texts.items()}


def bare(source: str) -> str:
    """Return Python source without comments, docstrings and formatting."""
    return ast.unparse(_bare(source))


def plain(what: str, value) -> str:
    """Return a plain value as JSON; raise TypeError that names `what` for another."""
    try:
        return json.dumps(value, default=np.generic.item)
    except TypeError as error:
        raise TypeError(f"{what}: got {value!r:.80}, expected numbers, strings, lists, or None") from error


def _bare(source):
    tree = ast.parse(dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@cache
def _parsed(source):
    module, tree = _Module(defaultdict(list), defaultdict(set), []), _bare(source)
    for node in ast.walk(tree):  # imports inside a function, too: a name may stand for all that it is bound to
        for name, target in _imports(node):
            module.imports[name].add(target)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or isinstance(getattr(node, "value", None), ast.Constant) and (
                isinstance(node, ast.Expr)):
            continue
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [
            name.id for name in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(name, ast.Name)]
        if names and not isinstance(node, ast.AugAssign | ast.For):
            for name in names:
                module.bound[name].append(node)
        decorators = "".join(map(ast.unparse, getattr(node, "decorator_list", [])))
        if not names or isinstance(node, ast.AugAssign | ast.For) or "register" in decorators:
            module.always.append(node)
    return module


def _imports(node):
    """Yield (name, (module, name)) for what an import takes from the helpers."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            package, _, module = alias.name.partition(".")
            if package == "helpers":
                for each in [module] if module else [path.stem for path in _FOLDER.glob("*.py")]:
                    yield alias.asname or package, (each, None)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "helpers":
        module = node.module.partition(".")[2]
        for alias in node.names:
            yield alias.asname or alias.name, (module, alias.name) if module else (alias.name, None)


def _named(tree, names):
    """Return the targets that `tree` reaches through `names`, name -> targets."""
    found, owners = set(), set()
    names = defaultdict(set, {name: set(targets) for name, targets in names.items()})
    for node in ast.walk(tree):
        for name, target in _imports(node):
            names[name].add(target)
    for node in ast.walk(tree):  # outermost first: an attribute comes before the name that it is one of
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owners.add(node.value)
            found |= {(module, name or node.attr) for module, name in names.get(node.value.id, ())}
        elif isinstance(node, ast.Name) and node not in owners:
            found |= names.get(node.id, set())
    return found


def _follow(name, module, statements):
    names = defaultdict(set, {each: {(name, each)} for each in module.bound})
    for each, targets in module.imports.items():
        names[each] |= targets
    return set().union(*(_named(statement, names) for statement in statements))


def _text(statements):
    return "\n".join(dict.fromkeys(map(ast.unparse, statements)))


def _target(value):
    """Return what of the helpers a module, function or class is, as a set of at most one (module, name)."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    package, _, module = home.partition(".")
    if package != "helpers":
        return set()
    if not isinstance(value, ModuleType):
        return {(module, value.__qualname__.partition(".")[0])}
    return {(module, None)} if module else {(path.stem, None) for path in _FOLDER.glob("*.py")}


def _used(label, function):
    """Return what a function takes from around it: globals, the variables of its closure, its defaults."""
    known, closure = function.__globals__, inspect.getclosurevars(function).nonlocals
    names = {step for step in _global_names(function.__code__) if step in known}
    parameters = inspect.signature(function).parameters.values()
    defaults = {f"{label}({each.name})": each.default for each in parameters if each.default is not each.empty}
    return ({name: known[name] for name in names} | {f"{label}[{name}]": value for name, value in closure.items()}
            | defaults)


def _global_names(code):
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _members(kind):
    """Return what a class and its bases in the same module hold: functions, those of properties, and plain values."""
    body = {f"{base.__qualname__}.{name}": member for base in reversed(kind.__mro__)
            if base.__module__ == kind.__module__ for name, member in vars(base).items()}
    ends = {f"{name}.{end}": getattr(member, end, None) for name, member in body.items()
            for end in ("fget", "fset", "fdel", "func")}  # of a property, or a functools.cached_property
    return {name: end for name, end in ends.items() if end} | {
        name: member for name, member in body.items() if inspect.isfunction(inspect.unwrap(member))
        or not hasattr(member, "__get__") and not name.endswith(("__", "._abc_impl"))}
