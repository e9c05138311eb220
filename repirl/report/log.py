"""Step metrics as JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLogger:
    """Appends one line for each step to OUTPUT_DIR/metrics.jsonl. The line is on disk when `log` returns.

    Values that are not finite are written as null, and their names under "nonfinite".

    Args:
        output_dir: the run's folder.
        tensorboard: write TensorBoard files, too.
        start_step: the number of finished steps of a resumed run; 0 for a new one. Lines of later steps, and an
            incomplete last line, are removed, so that no step is in the file twice.
    """

    def __init__(self, output_dir: str | os.PathLike, *, tensorboard: bool, start_step: int = 0) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= start_step and start_step > 0]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step; `step` counts finished steps."""
        nonfinite = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": step} | {n: None if n in nonfinite else v for n, v in metrics.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without an incomplete last line, which a killed run may leave."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
