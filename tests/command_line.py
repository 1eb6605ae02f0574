"""The command line inside this process: starting a Python for every case would take most of the tests' time."""

from __future__ import annotations

import sys

import pytest

from innerloop.cli import main


class CommandLine:
    """Runs ``innerloop ARGUMENTS`` and checks the exit code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setenv("COLUMNS", "250")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.delenv("FORCE_COLOR", raising=False)

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """What it printed on standard output; where it fails, on standard error."""
        self._monkeypatch.setattr(sys, "argv", ["innerloop", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = self._capsys.readouterr()
        assert (exit_.value.code or 0) == code, printed.out + printed.err
        return printed.out if code in (0, 130) else printed.err
