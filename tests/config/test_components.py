from __future__ import annotations

import pytest

from plora.config.components import instantiate, package_problem, resolve


def test_resolve_and_instantiate() -> None:
    assert resolve("fractions.Fraction")(1, 2) == 0.5
    assert instantiate({"_component_": "fractions.Fraction", "numerator": 3}, denominator=4) == 0.75


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("no_such_package_here.f", "no module 'no_such_package_here'"),
        ("os.no_such_module.f", "no module 'os.no_such_module'"),
        ("fractions.Fractoin", "did you mean 'Fraction'"),
    ],
)
def test_what_is_not_there_is_named(dotted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(dotted)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"fractions\.Fraction does not accept \['nominator'\]"):
        instantiate({"_component_": "fractions.Fraction", "nominator": 3})


def test_package_problem() -> None:
    assert package_problem("os.path.anything") is None
    assert "no package 'no_such_package_here'" in str(package_problem("no_such_package_here.f"))
