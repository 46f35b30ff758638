"""The table that the documentation prints is the one in force."""

from __future__ import annotations

from pathlib import Path

from bayesify.distributions import POSTERIORS, PRIORS, kl_table


def test_documented_table_is_the_one_in_force() -> None:
    text = (Path(__file__).parents[2] / "bayesify" / "distributions" / "README.md").read_text(encoding="utf-8")
    assert kl_table() in text
    for name in (*POSTERIORS, *PRIORS):
        assert f"\n| {name} |" in text, f"{name} has no row of its own"
