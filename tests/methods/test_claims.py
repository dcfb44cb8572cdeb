"""What methods say was published of them."""

import re

from dpft.harness.runs import registry
from dpft.methods.lora import DPLoRA

SOURCE = re.compile(r"\((quoted in )?(arXiv:\d{4}\.\d{4,5}|github\.com/[\w-]+/[\w.-]+)(, [^()]+)?\)$")


def test_a_claim_is_one_short_line_that_ends_with_its_source():
    claims = {name: m.claim for name, m in registry.methods().items() if m.claim}
    assert len(claims) > 20
    for name, claim in claims.items():
        assert len(claim) <= 110 and claim.isprintable() and "|" not in claim, name
        assert SOURCE.search(claim) and any(c.isdigit() for c in SOURCE.sub("", claim)), f"{name}: {claim}"


def test_only_what_was_published_has_a_claim():
    assert not any(m.claim for m in registry.methods().values() if m.control or not m.reference)


def test_a_method_that_is_derived_from_another_does_not_claim_its_results():
    assert DPLoRA.claim and not type("Variant", (DPLoRA,), {}).claim
    assert type("Own", (DPLoRA,), {"claim": "3 (arXiv:2110.06500)"}).claim.startswith("3")
