"""The one error family: every refusal carries a stable code, what was found, and what to do.

A class stands for an exit status (`exit_status`), a code for one kind of refusal. Codes are a
contract: scripts match on them, `docs/errors.md` lists them, and each has a fault test.
"""

from __future__ import annotations

from typing import Any

_NAME_LIMIT = 200

# What to do where the place that refuses knows nothing better: by code, else by its first word.
_HINTS = {
    "BUN-MANIFEST": "copy the bundle again, or export it again",
    "BUN": "export it again",
    "BUN-OUT": "choose another output folder",
    "CFG": "compare that field with the config.json that was published with the weights",
    "CFG-JSON": "fetch config.json again, as it was published with the weights",
    "CKPT": "fetch the checkpoint again, all its files of one revision",
    "CMP": "`mla-deploy compress --help` lists what it takes",
    "ENV-DISK": "free some space, or work on another disk",
    "EXP": "`mla-deploy export --help` lists what it takes",
    "FILE": "check what stands under that name",
    "FILE-MISSING": "check the path; of a Hugging Face cache, give the folder beneath snapshots/",
    "FILE-PERMISSION": "check the owner and mode of it and of the folders above",
    "PLAN": "`mla-deploy plan --help` lists what it takes",
    "REW": "`mla-deploy inspect` of the graph says what its attentions are",
    "RUN": "`mla-deploy run --help` lists what it takes",
    "SHAPE": "compare the sizes in config.json with the published ones",
    "SRC": "mla-deploy does not know this form yet; please report it",
    "REP": "write the report again, with `mla-deploy validate --report`",
    "TOK": "get the tokenizer's files of the same revision as the weights, and export again",
    "VAL": "`mla-deploy validate --help` lists what it takes",
}


class MlaDeployError(Exception):
    """A refusal: `code` (stable), `message` (found, wanted), `hint` (what to do), `details`."""

    exit_status = 1

    def __init__(self, code: str, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint or _HINTS.get(code) or _HINTS.get(code.partition("-")[0], "")
        self.details = details

    def __str__(self) -> str:
        text = f"[{self.code}] {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def to_dict(self) -> dict[str, Any]:
        """The `error` object that `--json` prints."""
        return {
            "code": self.code,
            "exit": self.exit_status,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
        }


class GateError(MlaDeployError):
    """The answer is no: a parity or memory gate was not met."""

    exit_status = 3


class InputError(MlaDeployError):
    """The input is malformed, unsafe, contradictory or unsupported."""

    exit_status = 4


class IntegrityError(MlaDeployError):
    """Bytes are not the ones that were written: hash, file set, stale mix."""

    exit_status = 5


class IncompatibleError(MlaDeployError):
    """Made for another format version, device, runtime or opset."""

    exit_status = 6


class EnvironmentFailure(MlaDeployError):
    """The machine cannot do it: disk, memory, permission, a missing extra."""

    exit_status = 7


class BusyError(MlaDeployError):
    """The output exists or another process holds it."""

    exit_status = 8


def quoted(name: object) -> str:
    """An untrusted name made fit for a message: escaped and cut to 200 characters."""
    text = ascii(str(name))
    return text if len(text) <= _NAME_LIMIT else text[: _NAME_LIMIT - 4] + "...'"
