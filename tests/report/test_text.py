"""What records hold cannot write the report: no cell, no link, no HTML and no second line comes out of a name or an error."""

import re

from report_cases import changed, failed, records, text_of

from dpft.harness.report.text import markdown, told

HOSTILE = "a|b <script>alert(1)</script> `c` [d](javascript:e) ![f](g)\\|"


def obeyed(text):
    """What markdown would take for more than text: without characters that a backslash guards."""
    return re.sub(r"\\.", "", text)


def test_a_text_of_a_record_is_text():
    assert not set(obeyed(told(HOSTILE))) & set("|`[]<>\\")
    assert "\n" not in told("a\n# b") and "\x1b" not in told("\x1b[31m")
    assert told("0.4*gamma(2,1) eval_every") == "0.4*gamma(2,1) eval_every", "what is harmless stays as it is"


def test_no_html_comes_out_of_a_report():
    assert (
        markdown(["a <b> <!-- c --> </d> <?e", "p < .05 and 3 <4"])
        == "a \\<b> \\<!-- c --> \\</d> \\<?e\n\np < .05 and 3 <4"
    )


def test_hostile_models_options_and_errors_stay_in_their_place(tmp_path):
    one, two = [r for r in records(task="sentences", lr=1e-4, seed=0) if r["spec"]["method"] in ("dp-adam", "rmt")]
    chosen = [
        changed(one, model=HOSTILE),
        changed(two, model=HOSTILE),
        changed(two, model=HOSTILE, options={"shrinker": HOSTILE}),
        {**failed(changed(one, model=HOSTILE, seed=5)), "error": HOSTILE},
    ]
    for record in chosen:
        record["provenance"]["hardware"]["cpu"] = HOSTILE
    text = obeyed(text_of(tmp_path, chosen))
    assert "alert" in text and not re.search(r"<[a-z]|\]\(|`c`", text)
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) >= 4 and len({row.count("|") for row in rows[:4]}) == 1, "every line has the cells of the head"
