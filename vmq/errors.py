"""The errors of vmq. Each message is one line: what was found, and what to do about it.

VmqError
├── ModelError    the model file, or something in its graph, cannot be compiled
├── MediaError    a video, a folder of frames or a dataset cannot be read
├── OptionError   an option's value makes no sense
├── FetchError    trained weights could not be downloaded
├── OutputError   a result cannot be written
├── PassError     a pass of the pipeline failed, or left an invalid graph
└── ProcessError  of several processes that share the work, one is gone or holds something else
"""

from __future__ import annotations


class VmqError(Exception):
    """Base of all errors that vmq raises on purpose; the command line prints it and exits with 2."""


class ModelError(VmqError, ValueError):
    """The model cannot be read, is damaged, or holds something vmq does not support."""


class MediaError(VmqError, ValueError):
    """A video, image folder or dataset is unreadable, empty, or of a wrong size."""


class OptionError(VmqError, ValueError):
    """An option has a value that cannot be used."""


class FetchError(VmqError, OSError):
    """Trained weights are not reachable, or what arrived is not what was expected."""


class OutputError(VmqError, OSError):
    """A result cannot be written."""


class PassError(VmqError, RuntimeError):
    """A pass failed.

    Attributes:
        pass_name: the pass that failed.
    """

    def __init__(self, message: str, *, pass_name: str = "") -> None:
        super().__init__(message)
        self.pass_name = pass_name


class ProcessError(VmqError, RuntimeError):
    """Processes that share the work lost one of them, or do not hold the same."""
