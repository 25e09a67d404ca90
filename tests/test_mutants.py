"""The wrong wirings of mutants.toml still fit the code. Whether a test notices them, tests/mutants.py tells."""

import ast
import collections

import mutants
import pytest

MUTANTS = mutants.load()
# The plainest mistakes of all, which must never be missing.
NAMED = {
  "byol-views-with-themselves",
  "byol-target-rate-inverted",
  "mae-mask-inverted",
  "moco-v2-temperature-times-ten",
  "moco-key-rate-inverted",
}


def test_there_are_many_and_each_has_a_name_of_its_own():
  counts = collections.Counter(mutant["name"] for mutant in MUTANTS)
  assert len(MUTANTS) >= 60
  assert [name for name, count in counts.items() if count > 1] == []
  assert counts.keys() >= NAMED


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_it_fits_the_code(mutant):
  assert mutant.keys() <= {"name", "file", "old", "new", "why", "equivalent", "tests"}
  assert mutant["why"].strip() and mutant["old"].strip()
  text = (mutants.ROOT / mutant["file"]).read_text()
  assert text.count(mutant["old"]) == 1
  changed = text.replace(mutant["old"], mutant["new"])
  assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), "only the layout or a comment differs"
  assert mutants.likely(mutant), "no test file is likely to notice it: see LIKELY"


def test_only_a_failing_test_kills():
  for status, output, said in (
    (0, "3 passed in 1.00s", ("passed", "")),
    (1, "FAILED tests/test_a.py::test_b[1 2] - assert 1 == 2\n1 failed", ("killed", "tests/test_a.py::test_b[1 2]")),
    (1, "ERROR tests/test_a.py::test_b - ValueError: no\n1 error", ("killed", "tests/test_a.py::test_b")),
    (1, "ERROR tests/test_a.py - ImportError: no\n1 error", ("broken", "status 1: 1 error")),
    (2, "ERROR tests/test_a.py\n1 error", ("broken", "status 2: 1 error")),
    (4, "", ("broken", "status 4: no output")),
    (5, "no tests ran", ("broken", "status 5: no tests ran")),
  ):
    assert mutants.verdict(status, output) == said
