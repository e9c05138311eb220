"""The code blocks of kernels/README.md, found by the heading they stand under, so that tests run what readers copy."""

import re
import sys
from pathlib import Path
from types import ModuleType

README = Path(__file__).parents[2] / "kernels" / "README.md"


def section_code(heading: str) -> str:
    """The one Python block under ``### heading``."""
    text = README.read_text(encoding="utf-8")
    sections = re.split(r"^#{2,3} (.*)\n", text, flags=re.MULTILINE)
    body = dict(zip(sections[1::2], sections[2::2], strict=True))[heading]
    (code,) = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    return code


def run_section(heading: str) -> ModuleType:
    """Run the block as a module, and return that."""
    module = ModuleType(f"readme: {heading}")
    # torch.compile looks up by name where a function's globals are.
    sys.modules[module.__name__] = module
    exec(compile(section_code(heading), f"{README.name}: {heading}", "exec"), module.__dict__)
    return module
