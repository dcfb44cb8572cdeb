"""What functions that look at examples may not do: keep anything of them. Read from the source of methods."""

import ast

KINDS = {"Values": {"of"}, "Beside": {"of"}, "Gradients": {"loss"}, "replace": {"of", "loss"}}
GROWS = {
    "add", "append", "appendleft", "extend", "extendleft", "insert", "put", "register_buffer", "setdefault", "update", "write",
    "__setattr__", "__setitem__",
}  # fmt: skip
FRESH = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Source:
    """The functions of a file and of what it may import: `others`, sources of the same kind."""

    def __init__(self, text, others=()):
        self.tree, self.others = ast.parse(text), others
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, FUNCTION[:2])}
        self.named = {
            target.id: node.value
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def function(self, name):
        for source in (self, *self.others):
            if name in source.functions:
                return source.functions[name]
        return None

    def handed(self):
        """The expressions that are handed to questions as `of` or `loss`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield from (keyword.value for keyword in node.keywords if keyword.arg in KINDS.get(called, ()))

    def resolved(self, value):
        """The functions that an expression may be; None for one that cannot be read."""
        if isinstance(value, ast.Constant) and value.value is None:
            return
        if isinstance(value, ast.IfExp):
            yield from self.resolved(value.body)
            yield from self.resolved(value.orelse)
        elif isinstance(value, ast.Lambda):
            yield value
        elif isinstance(value, ast.Call) and getattr(value.func, "id", "") == "partial":
            yield from self.resolved(value.args[0])
        elif isinstance(value, ast.Attribute) and getattr(value.value, "id", "") == "self":
            yield self.function(value.attr)
        elif isinstance(value, ast.Name) and value.id in self.functions:
            yield self.functions[value.id]
        elif isinstance(value, ast.Name) and value.id in self.named:
            yield from self.resolved(self.named[value.id])
        elif isinstance(value, ast.Name):
            yield self.function(value.id)
        else:
            yield None


def keeping(source):
    """A sentence for everything by which a function that is handed to a question could keep what it saw."""
    found = []
    for value in source.handed():
        for function in source.resolved(value):
            if function is None:
                found.append(f"line {value.lineno}: {ast.unparse(value)} is not a function that can be read here")
            else:
                found += [f"line {n.lineno}: {ast.unparse(n)[:80]}" for n in _kept(source, function, set())]
    return found


def _kept(source, function, seen):
    if id(function) in seen:
        return
    seen.add(id(function))
    body = function.body if isinstance(function.body, list) else [function.body]
    nodes = [node for statement in body for node in ast.walk(statement)]
    own = {id(n) for made in nodes if isinstance(made, ast.ClassDef) for n in _assigned_at_birth(made)}
    fresh = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, FRESH)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    yield from (
        d
        for d in (*function.args.defaults, *filter(None, function.args.kw_defaults))
        if isinstance(d, (*FRESH, ast.Call))
    )
    for node in nodes:
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield node
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            inside = isinstance(node, ast.Subscript) and getattr(node.value, "id", None) in fresh
            if not inside and id(node) not in own:
                yield node
        elif isinstance(node, ast.Call):
            yield from _called(source, node, fresh, seen)


def _called(source, node, fresh, seen):
    if isinstance(node.func, ast.Name):
        if node.func.id in ("setattr", "exec", "eval", "open", "print", "globals", "vars"):
            yield node
        elif (inner := source.function(node.func.id)) is not None:
            yield from _kept(source, inner, seen)
    elif isinstance(node.func, ast.Attribute):
        base, name = node.func.value, node.func.attr
        in_place = name.endswith("_") and not name.endswith("__")
        if (name in GROWS or in_place) and isinstance(base, (ast.Name, ast.Attribute, ast.Subscript)):
            if not (isinstance(base, ast.Name) and base.id in fresh) and not _library(base):
                yield node
        elif getattr(base, "id", "") == "self" and (inner := source.function(name)) is not None:
            yield from _kept(source, inner, seen)


def _library(base):
    return isinstance(base, ast.Name) and base.id in ("torch", "math", "functional", "F")


def _assigned_at_birth(made):
    """Attributes of `self` that the `__init__` of a class sets, which is made inside of a function."""
    for function in made.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            own = function.args.args[0].arg
            yield from (
                n for n in ast.walk(function) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == own
            )
