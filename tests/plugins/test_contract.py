"""Plug-ins that break the contract: one sentence each, with the class, what is wrong and what to do."""

import importlib
import textwrap

import pytest

from dpft.harness.errors import BadInput
from dpft.harness.plugins import contract, loading
from dpft.harness.runs import registry

HEADER = """
from dpft.methods.base import Gradients, Method
from dpft.methods.clipping.base import ClippingRule
from dpft.methods.decoders.base import Decoder
from dpft.tasks.base import Task
from dpft.tasks.lowrank import LowRank
"""
FINE = """
class Mine(Method):
    name = "mine"
"""


@pytest.fixture
def load(tmp_path):
    """Load a plug-in of this text; afterwards there is none."""
    count = len(registry._PLUGINS)

    def loading(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(HEADER + textwrap.dedent(text))
        registry.load_plugin(path)
        return path

    yield loading
    del registry._PLUGINS[count:]
    registry.forget()


def of(base, *lines, name='name = "mine"'):
    return "\n".join([f"class Mine({base}):", *(f"    {line}" for line in (name, *lines))])


DECODE = "def decode(self, noisy, step): return noisy.mean()"


@pytest.mark.parametrize(
    "text, words",
    [
        # names
        (of("Method", name="pass"), ['no `name` of its own', 'name = "mine"']),
        (of("Method", name="name = 5"), ["the name 5", "write for example 'mine'"]),
        (of("Method", name='name = "My Method"'), ["'My Method'", "write for example 'my-method'"]),
        (of("Method", name='name = "../up"'), ["'../up'", "write for example 'up'"]),
        (of("Method", name='name = "<b>"'), ["'<b>'", "write for example 'b'"]),
        (of("Method", name='name = "a,b"'), ["'a,b'"]),
        (of("Decoder", DECODE, name="name = None"), ["decoder Mine", "None"]),
        # values of the contract
        (of("Method", "version = 0"), ["`version` is 0", "count from 1"]),
        (of("Method", 'version = "2"'), ["`version` is '2', not a whole number"]),
        (of("Method", "summary = 3"), ["`summary` is 3, not a text"]),
        (of("Method", "private = 1"), ["`private` is 1, not True or False"]),
        (of("Method", "asks = Gradients"), ["`asks`", "(Gradients,)"]),
        (of("Method", "asks = ()"), ["`asks`", "(Gradients,)"]),
        (of("Method", "options = ['rank']"), ["`options` is ['rank'], not a dictionary"]),
        (of("LowRank", "metric = None"), ["task Mine", "`metric` is None, not a text"]),
        (of("Task"), ["has no `version`", "a whole number"]),
        # misspelt, or of another kind
        (of("Method", "def steps(self, ask, step): return {}"), ["`steps` is a value", "did you mean `step`?"]),
        (of("Method", "def setp(self, ask, step): return {}"), ["`setp`", "did you mean `step`?"]),
        (of("Method", "def prepar(self, model, generator): return model"), ["`prepar`", "did you mean `prepare`?"]),
        (of("Method", "default = {'lr': 1.0}"), ["`default`", "did you mean `defaults`?"]),
        (of("Decoder", "def decod(self, noisy, step): return {}"), ["`decod`", "did you mean `decode`?"]),
        (of("LowRank", "chanse = 1.0"), ["`chanse`", "did you mean `chance`?"]),
        (of("Decoder"), ["no function `decode`", "def decode(self, noisy, step)"]),
        (of("Decoder", DECODE, "def carries(self): return True"), ["`carries`", "@property"]),
        (of("Method", "step = None"), ["`step` is None, not a function", "def step(self, ask, step)"]),
        # signatures
        (of("Method", "def step(self, ask): return {}"), ["`step` cannot be called", "def step(self, ask, step)"]),
        (of("Method", "def step(self, ask, step, more): return {}"), ["def step(self, ask, step)"]),
        (of("Method", "def __init__(self): pass"), ["def __init__(self, options, decoder)"]),
        (of("Decoder", "def decode(self, noisy): return {}"), ["def decode(self, noisy, step)"]),
        (of("ClippingRule", "def start(self, spec): pass"), ["clipping rule Mine", "def start(self, spec,"]),
        (of("LowRank", "def loss(self, model): pass"), ["def loss(self, model, batch)"]),
        # defaults and options
        (of("Method", "defaults = {'learning_rate': 1e-3}"), ["`defaults` sets learning_rate"]),
        (of("Method", "defaults = {'clipnorm': 1.0}"), ["`defaults` sets clipnorm", "did you mean 'clip_norm'?"]),
        (of("Method", "defaults = {'lr': 'fast'}"), ["`defaults` sets lr", "correct it"]),
        (of("Method", "defaults = {'method_version': 2}"), ["`defaults` sets method_version"]),
        (of("Method", "defaults = {'seed': 2}"), ["`defaults` sets seed", "leave it out"]),
        (of("Method", "options = {'rank': 1}", "defaults = {'rank': 2}"), ["`defaults` sets rank", "`options`"]),
        (of("Method", "options = {'steps': 1}"), ["option 'steps'", "rename it"]),
        (of("Method", "options = {'my rank': 1}"), ["option 'my rank'"]),
        (of("Method", "options = {'rank': None}"), ["option 'rank' is None"]),
        (of("Method", "options = {'rank': {}}"), ["option 'rank' is {}"]),
        (of("Method", "options = {'rank': float('nan')}"), ["option 'rank' is nan"]),
        (of("Method", "options = {'rank': 1}", "ranges = {'rnk': (1, 2)}"), ["`ranges`", "did you mean 'rank'?"]),
        (of("Method", "options = {'rank': 1}", "ranges = {'rank': (2, 3)}"), ["'rank' is 1", "`ranges`"]),
        (of("Method", "options = {'rank': 1}", "ranges = {'rank': 2}"), ["'rank' is 1", "`ranges`"]),
        (of("Method", "space = {'rank': (1, 2)}"), ["`space` speaks of rank"]),
        (of("Method", "space = {'lr': (0.0, 1.0)}"), ["`space` gives lr (0.0, 1.0)", "above 0"]),
        (of("Method", "space = {'lr': 1.0}"), ["`space` gives lr 1.0"]),
        (of("Method", "options = {'form': 'a'}", "choices = {'form': ('b', 'c')}"), ["'form' is 'a'", "`choices`"]),
    ],
)  # fmt: skip
def test_a_class_that_breaks_the_contract_is_one_sentence(load, text, words):
    with pytest.raises(BadInput) as refused:
        load(text)
    for word in ("mine.py: ", " Mine: ", *words):
        assert word in str(refused.value)
    assert "mine" not in registry.methods() and not registry._PLUGINS


def test_what_files_may_hold_besides(load):
    load(
        """
        class Shared(Method):
            "What both have in common; nobody can ask for it."
            def steps_of(self):
                return self.steps

        class First(Shared):
            name = "first"
            options = {"rank": 1, "names": ["a"], "form": "x"}
            choices = {"form": ["x", "y"]}

        class Second(Shared):
            name = "second_2.b"

            @staticmethod
            def kind(step):
                return ""

            def step(self, ask, step, *, more=None):
                return {}

        class _Draft(Method):
            pass
        """
    )
    assert {"first", "second_2.b"} <= registry.methods().keys()


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = (", ["SyntaxError"]),
        ("import no_such_module_of_mine", ["ModuleNotFoundError", "line 8"]),
        ("\n\n1 / 0", ["ZeroDivisionError", "line 10"]),
        ("import sys\nsys.exit(0)", ["sys.exit", "line 9"]),
        ("x = 1", ["defines none of these: method, decoder, clipping rule, task", "dpft new"]),
    ],
)
def test_a_file_that_does_not_import_is_named_with_the_line(load, text, words):
    with pytest.raises(BadInput) as refused:
        load("\n" + text)
    for word in ("mine.py", *words):
        assert word in str(refused.value)


def test_an_interrupt_while_a_plugin_is_imported_is_an_interrupt(load):
    with pytest.raises(KeyboardInterrupt):
        load("raise KeyboardInterrupt")


def test_a_file_that_is_not_python_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(HEADER + FINE)
    with pytest.raises(BadInput, match="ends in .py"):
        registry.load_plugin(path)


def test_a_file_is_loaded_once_and_two_of_one_stem_stand_side_by_side(load, tmp_path):
    path = load(FINE)
    registry.load_plugin(path)
    (tmp_path / "more").mkdir()
    load(FINE.replace('"mine"', '"other"'), "more/mine.py")
    assert {"mine", "other"} <= registry.methods().keys() and len(registry._PLUGINS) == 2
    load(FINE, "third.py")
    with pytest.raises(BadInput, match=r"Two methods are called 'mine', in .*mine.py and .*third.py; rename one"):
        registry.methods()


def test_the_classes_of_dpft_keep_the_contract_and_all_of_it_is_looked_at():
    for kind, (package, name, _) in registry.KINDS.items():
        base = getattr(importlib.import_module(f"{package}.base"), name)
        for cls in registry._found(kind).classes.values():
            contract.check(cls, base, cls.__name__)
        classes = [text for text in contract.annotations(base).values() if text.startswith("ClassVar")]
        unknown = {text[9:-1] for text in classes} - contract._TYPES.keys()
        assert unknown <= {"tuple[type, ...]"}, "asks alone is looked at elsewhere"
        assert classes


# --- entry points


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package of one module with these entry points, until the test ends."""

    def install(text, **points):
        folder = tmp_path / "mine_pkg-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-pkg\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (folder / "entry_points.txt").write_text(f"[dpft.methods]\n{lines}")
        (tmp_path / "mine_pkg.py").write_text(HEADER + textwrap.dedent(text))
        registry.forget()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "mine_pkg", raising=False)
    yield install
    monkeypatch.undo()
    registry.forget()


@pytest.mark.parametrize(
    "text, value, words",
    [
        (FINE, "mine_pkg:Mien", ["does not load mine_pkg:Mien", "AttributeError"]),
        ("1 / 0", "mine_pkg:Mine", ["ZeroDivisionError"]),
        ("import sys\nsys.exit(0)", "mine_pkg:Mine", ["sys.exit"]),
        (FINE, "mine_pkg:HEADER", ["does not load"]),
        ("Mine = 5", "mine_pkg:Mine", ["is no method", "subclass of Method"]),
        ("class Mine(Method): pass", "mine_pkg:Mine", ["no `name` of its own"]),
        (FINE.replace('"mine"', '"dp-sgd"'), "mine_pkg:Mine", ["Two methods are called 'dp-sgd'"]),
    ],
)
def test_a_broken_entry_point_stops_those_alone_who_ask_for_it(installed, dpft, text, value, words):
    installed(text, mine=value)
    assert registry.method("dp-sgd").__module__ == "dpft.methods.full"
    for asked in ("mine", "mien"):
        with pytest.raises(BadInput) as refused:
            registry.method(asked)
        assert all(word in str(refused.value) for word in ("entry point mine", "mine-pkg", *words))
    code, out, err = dpft("list", "methods")
    assert code == 0 and "dp-sgd" in out and "entry point mine" in err
    code, out, err = dpft("describe", "mine")
    assert code == 2 and "no method" in err and "entry point mine" in err


def test_an_entry_point_that_is_fine_is_a_method_like_others(installed, dpft):
    installed(FINE, whatever="mine_pkg:Mine")
    assert registry.method("mine").__name__ == "Mine" and registry.set_aside("method") == []
    code, out, err = dpft("list", "methods")
    assert code == 0 and err == "" and "\nmine " in out


def test_a_package_whose_name_nobody_knows_is_called_a_package():
    point = importlib.metadata.EntryPoint("mine", "no_such_module_of_mine:Mine", "dpft.methods")
    with pytest.raises(BadInput, match="of a package does not load"):
        loading.loaded(point, object, "method")
