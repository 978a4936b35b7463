"""The table of rules: reading it, and what it makes of objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inference.case import Box, Case, Click, ObjectPrompts
from inference.object_features import FEATURES, ObjectFeatures
from inference.policy import (
    POLICY_FILE,
    Condition,
    Policy,
    Rule,
    load_policy,
)
from inference.refinement import ObjectLogits
from tests.test_adaptive_steps import ball

PLAIN = ObjectFeatures(**dict.fromkeys(FEATURES, 1.0))


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_ships_can_be_read():
    assert load_policy() == load_policy(POLICY_FILE)


def test_a_table_is_read_as_it_is_written(tmp_path):
    path = write(
        tmp_path,
        "format = 1\n"
        '[[rule]]\nstep = "islands"\namount = 1\nwhere = ["scatter >= 0.05", "voxels<1e4"]\n'
        '[[rule]]\nstep = "smooth"\namount = 0.02\nmodality = "PET"\n',
    )
    conditions = Condition("scatter", False, 0.05), Condition("voxels", True, 10000.0)
    assert load_policy(path) == Policy(
        (Rule("islands", 1.0, "any", conditions), Rule("smooth", 0.02, "PET", ()))
    )
    assert [str(condition) for condition in conditions] == ["scatter >= 0.05", "voxels < 10000"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format = ", "TOML"),
        ("", "format None"),
        ("format = 2", "format 2"),
        ("format = 1\nrule = 3", "array of tables"),
        ('format = 1\n[[rule]]\nstep = "polish"', "'polish'"),
        ('format = 1\n[[rule]]\nstep = ["trim"]\namount = 1', "step ['trim']"),
        ('format = 1\n[[rule]]\nstep = "smooth"', "amount None"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 0', "amount 0"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 2.5', "at most 2"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = nan', "amount nan"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = true', "amount True"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 1\nmodality = 3', "modality 3"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 1\nwhere = "x"', "where 'x'"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 1\nwhere = ["x < 1"]', "'x < 1'"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 1\nwhere = ["noise < -"]', "'noise < -'"),
        ('format = 1\n[[rule]]\nstep = "smooth"\namount = 1\nwhere = [1]', "condition 1"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError, match="accepted") as refusal:
        load_policy(write(tmp_path, text))
    assert words in str(refusal.value)
    assert "policy.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_first_rule_that_applies_counts_and_steps_keep_their_order():
    policy = Policy(
        (
            Rule("smooth", 0.1, "PET"),
            Rule("smooth", 0.2, "any", (Condition("noise", True, 0.5),)),
            Rule("smooth", 0.3),
            Rule("islands", 0.4, "any", (Condition("noise", False, 0.5),)),
        )
    )
    assert policy.steps("PET", PLAIN) == [("islands", 0.4), ("smooth", 0.1)]
    assert policy.steps("CT", PLAIN) == [("islands", 0.4), ("smooth", 0.3)]


def test_each_object_is_cleaned_by_its_own_prompts():
    image = np.zeros((30, 30, 30), np.uint8)
    logits = np.maximum(ball(6), ball(2, centre=(3, 3, 3)))
    results = [ObjectLogits(label, (4, 5, 6), logits.copy()) for label in (1, 2)]
    results.append(ObjectLogits(3, (0, 0, 0), np.zeros((0, 0, 0), np.float32)))
    prompts = (
        ObjectPrompts(1, Box((8, 8, 8), (22, 22, 22), 15)),
        ObjectPrompts(2, None, (Click((7, 8, 9), True),)),  # in the small ball
        ObjectPrompts(3, None, (Click((0, 0, 0), False),)),
        ObjectPrompts(4),
    )
    results.append(ObjectLogits(4, (4, 5, 6), logits.copy()))
    case = Case("CT_x.npz", image, (1.0, 1.0, 1.0), prompts)
    first, second, third, silent = Policy((Rule("islands", 0.5),)).clean(results, case)
    assert np.array_equal(first.logits > 0, ball(6) > 0)
    assert second.logits is results[1].logits
    assert third is results[2]
    assert silent is results[3], "nothing is said about it"
    assert [one.start for one in (first, second)] == [(4, 5, 6)] * 2
    assert list(Policy().clean(results, case)) == results
