"""Problems say what to do, travel between processes whole, and are the ones the docstring draws."""

from __future__ import annotations

import copy

import pytest

from raydiff.errors import RaydiffError
from raydiff.images import ImageError
from raydiff.service import problems
from raydiff.service.problems import PROBLEM_TYPES, ProblemError


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_the_docstring_draws_every_problem_with_its_status(kind: problems.ProblemType) -> None:
    lines = [line.split() for line in (problems.__doc__ or "").splitlines()]
    [line] = [line for line in lines if line and line[0] == kind]
    assert int(line[1]) == ProblemError(kind, "x").status


def test_a_problem_survives_the_way_to_another_process() -> None:
    problem = copy.deepcopy(ProblemError("damaged-image", "It is broken; send another."))
    assert problem.to_dict()["detail"] == str(problem) == "It is broken; send another."
    assert isinstance(problem, RaydiffError)
    error = copy.deepcopy(ImageError("a: is broken", "damaged"))
    assert (str(error), error.reason) == ("a: is broken", "damaged")
