"""The rule by which the repository reads what its methods hand to questions finds what keeps something, and nothing else."""

import pytest
from closures import Source, keeping

AROUND = "def of(seen):\n    {}\n    return seen.losses"
KEEPS = {
    "an attribute": AROUND.format("self.kept = seen.losses"),
    "an attribute of the model": AROUND.format("seen.model.kept = seen.losses"),
    "added to an attribute": AROUND.format("self.total += seen.losses.sum()"),
    "an entry": AROUND.format("kept['losses'] = seen.losses"),
    "an entry of an argument": AROUND.format("kept[0] = seen.losses").replace("seen)", "seen, kept=None)"),
    "a list outside": AROUND.format("kept.append(seen.losses)"),
    "a list behind a name": AROUND.format("mine = self.kept; mine.append(seen.losses)"),
    "a list of its own that stays": AROUND.format("kept.append(seen.losses)").replace("seen)", "seen, kept=[])", 1),
    "a name outside": AROUND.format("global kept; kept = seen.losses"),
    "a name of the step": AROUND.format("nonlocal kept; kept = seen.losses"),
    "a tensor in place": AROUND.format("self.total.add_(seen.losses.sum())"),
    "setattr": AROUND.format("setattr(self, 'kept', seen.losses)"),
    "a buffer": AROUND.format("seen.model.register_buffer('kept', seen.losses)"),
    "in what it calls": AROUND.format("note(seen)") + "\ndef note(seen):\n    kept.append(seen.losses)",
    "in a method that it calls": AROUND.format("self.note(seen)") + "\ndef note(self, seen):\n    self.kept = 1",
    "a file": AROUND.format("open('kept', 'w').write(str(seen.losses))"),
    "in a lambda": "of = lambda seen: self.kept.append(seen.losses)",
    "a function nobody can read": "of = made_elsewhere()",
}
FINE = {
    "a lambda": "of = lambda seen: seen.losses[:, None]",
    "names and lists of its own": AROUND.format("rows = []; rows.append(seen.losses); found = {}; found[1] = rows"),
    "partial": "def rows(seen, scale):\n    return seen.losses * scale\nof = partial(rows, scale=2)",
    "no question": "of = None",
    "a library": AROUND.format("found = torch.where(seen.losses > 0, 1.0, 0.0)"),
    "a module that wraps the loss": """
def of(loss):
    class Whole(Module):
        def __init__(self, model):
            self.model = model

    return Whole
""",
}
CALLS = ["Values(size=1, of=of, bound=1)", "Beside(size=1, of=of)", "Gradients(loss=of)", "replace(query, of=of)"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_something_is_found(name, call):
    assert keeping(Source(f"{KEEPS[name]}\n{call}\n"))


@pytest.mark.parametrize("name", FINE)
def test_what_keeps_nothing_is_not(name):
    assert keeping(Source(f"{FINE[name]}\nValues(size=1, of=of, bound=1)\nGradients(loss=of)\n")) == []


def test_functions_of_other_files_are_read_too():
    other = Source("def whole(seen):\n    cache.append(seen)\n    return seen.lengths\n")
    assert keeping(Source("Values(size=1, of=lambda seen: whole(seen), bound=1)", [other]))
    assert keeping(Source("Values(size=1, of=self.whole, bound=1)", [other]))
