"""``mount``: what it says of a mount that was made."""

import importlib

import pytest

from quorumfs.control import client

cli = importlib.import_module("quorumfs.cli.mount")  # the name in the package is the command

MOUNTPOINT = "/mnt/vdisk"


def told(
    error: client.ControlError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What it says where the question after the mount's status ends with *error*."""

    def status(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(client, "status", status)
    cli._tell(MOUNTPOINT, None, 1.0)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "kind",
    [
        client.NoAnswerError,
        client.InvalidAnswerError,
        client.DaemonGoneError,
        client.ProtocolError,
    ],
)
def test_a_mount_that_cannot_be_asked_is_not_called_in_order(
    kind: type[client.ControlError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """P6: silence would say that it can be used."""
    line = told(kind("the reason"), monkeypatch, capsys)
    assert line.startswith("quorumfs: warning: mounted, but nothing tells whether it is in order")
    assert line.endswith("the reason\n")


def test_a_mount_that_somebody_unmounts_at_once_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(client.NotMountedError("it is not mounted"), monkeypatch, capsys) == ""
