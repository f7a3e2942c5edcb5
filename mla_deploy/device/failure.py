"""The one exception of this folder: what is wrong on this device, and the exit status it means."""

from __future__ import annotations

EXITS = {"no": 3, "input": 4, "integrity": 5, "incompatible": 6, "environment": 7}


class DeviceFailure(Exception):
    """A refusal of one line. `kind` is a key of `EXITS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    @property
    def exit_status(self) -> int:
        """What a script ends with: the statuses of `mla-deploy`."""
        return EXITS[self.kind]
