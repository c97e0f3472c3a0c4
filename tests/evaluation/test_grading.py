r"""Which answers are right: numbers, and what \boxed{…} holds."""

import threading

import pytest

from pairquant.evaluation import grading
from pairquant.evaluation.grading import boxed, require_math_verify, same_boxed, same_number
from pairquant.support.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        ("no box", None),
        (r"\boxed{", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_complete_box_counts(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (r"first 3, then \boxed{18}", "18", True),
        (r"\boxed{\$18{,}000.00} for 4 people", "18,000", False),  # LaTeX's thousands are two numbers
        (r"\boxed{\$18,000.00} for 4 people", "18,000", True),
        ("16 - 3 - 4 = 9\n#### 9 eggs", "9", True),
        ("#### 9\n#### 10", "10", True),
        ("That makes 18 dollars", "18", True),
        ("-5 degrees", "-5", True),
        ("It is 5.", "-5", False),
        ("0.50", ".5", True),
        ("none", "0", False),
        (r"\boxed{unknown} 18", "18", False),
    ],
)
def test_numbers(text, expected, right):
    assert same_number(text, expected) is right


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{070}", "70", True),
        (r"\boxed{1+x^2}", "x^2+1", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"\boxed{Tuesday}", "Monday", False),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{3} or rather \boxed{4}", "3", False),
        ("it is 204", "204", False),
        (r"\boxed{}", "2", False),
        (r"\boxed{__import__('os').abort()}", "2", False),
    ],
)
def test_boxes(text, expected, right):
    pytest.importorskip("math_verify")
    assert same_boxed(text, expected) is right


def test_boxes_are_compared_outside_the_main_thread_too():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(same_boxed(r"\boxed{\frac{6}{4}}", "1.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_without_math_verify_boxes_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Math-Verify, which is not installed. Run: pip install 'pairquant\[eval\]'"):
        require_math_verify()


def test_with_math_verify_nothing_is_said():
    pytest.importorskip("math_verify")
    require_math_verify()


def test_a_number_that_no_machine_can_hold_is_still_compared_exactly():
    digits = "9" * 400
    assert same_number(f"#### {digits}", digits)
    assert not same_number(f"#### {digits}0", digits)
