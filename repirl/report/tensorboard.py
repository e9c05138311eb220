"""Metrics as a TensorBoard file.

Not through torch's SummaryWriter: that one writes in a thread of its own, whose errors end up as tracebacks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

# Marks values for the page of texts.
_TEXT = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"), data_class=DATA_CLASS_TENSOR)


class TensorBoardFile:
    """A new file of events in a folder.

    Args:
        folder: is made if it does not exist.
        first_step: what older files hold of this step and later ones no longer counts.

    Raises:
        OSError: here, and in `write` and `close`.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write(self, step: int, metrics: dict[str, float], texts: Mapping[str, str]) -> None:
        """Write metrics and Markdown texts of a step, by name. They are in the file when this returns."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        values += [
            Summary.Value(tag=name, metadata=_TEXT, tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]))
            for name, text in texts.items()
        ]
        self._add(step=step, summary=Summary(value=values))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
