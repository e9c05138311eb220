"""The section `verifier.code` of the configuration: how programs are run and judged."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from repirl.section import NonNegativeFloat, Positive, Section


class CodeConfig(Section):
    test_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        6.0, description="longest time of one run of a program, by the clock and of a CPU"
    )
    memory_mb: Positive = Field(512, description="most memory of a program with all that it starts")
    max_processes: Positive = Field(16, description="most processes and threads of a program at a time")
    max_open_files: Positive = Field(64, description="most files that a program has open at a time")
    max_file_mb: Positive = Field(16, description="largest file that a program writes")
    max_output_kb: Positive = Field(
        1024, description="most that a program prints or returns, besides twice the length of what is right"
    )
    float_tolerance: NonNegativeFloat = Field(
        1e-6, description="how far a float may be from the right one, absolutely or as a share of it"
    )
    partial_credit: bool = Field(False, description="the reward is the share of tests that pass; false: 1 if all do")
    checker: str | None = Field(
        None,
        description='a function of your own as "module:name" that judges outputs, where several are right: of (output, '
        "test), both texts, the test as JSON with input and outputs; it returns 1 or 0",
    )
    judge_twice: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="share of the responses that are judged twice, to see how many verdicts differ "
        "(rollout/verifier_differing); the first one counts",
    )
    allow_unsandboxed: bool = Field(
        False, description="run programs on a machine without the means for a sandbox, with limits alone; false: refuse"
    )

    def check(self, name: str) -> None:
        """ValueError for options that cannot be used; name: of this section."""
        if self.checker is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.checker):
            raise ValueError(
                f'{name}.checker is {self.checker!r}, expected "module:name", such as my_checks:same_set for the '
                "function same_set of my_checks.py"
            )
