"""Owns how onnxruntime shares the cores among the runs of a face model, of which several are under way at once."""

from __future__ import annotations

import onnxruntime


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for a session whose runs take `threads` threads each; 0 takes all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads of one caller take the cores from the next: a quarter of the throughput with two callers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
