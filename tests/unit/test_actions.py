"""Actions: begun and asked about from another thread, carried out in the loop."""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from quorumfs.errors import ExitCode, UsageError, UserError
from quorumfs.live.actions import KEPT, Action, Actions, Request


async def begun(actions: Actions, verb: str, **arguments: object) -> int:
    """The number of an action, asked for as the thread of the control socket does."""
    command = actions.commands()[verb]
    answer = await trio.to_thread.run_sync(command, {"command": verb, **arguments})
    number: int = answer["action"]
    return number


async def ended(actions: Actions, number: int) -> dict[str, Any]:
    """What it gives at its end."""
    while True:
        answer = actions.look({"command": "action", "action": number})
        if answer["done"]:
            return answer
        await trio.sleep(0.001)


def with_actions(
    test: Callable[[Actions], Awaitable[None]],
    **verbs: Callable[[Request, Action], Awaitable[dict[str, Any]]],
) -> None:
    async def main() -> None:
        actions = Actions(verbs)
        async with trio.open_nursery() as nursery:
            await nursery.start(actions.run)
            await test(actions)
            await actions.stop()

    trio.run(main)


async def echo(request: Request, _: Action) -> dict[str, Any]:
    return {"message": request.text("text")}


def test_what_a_verb_gives_is_told_at_its_end() -> None:
    release = trio.Event()

    async def slow(request: Request, action: Action) -> dict[str, Any]:
        action.doing = "waiting for the test"
        await release.wait()
        return await echo(request, action)

    async def test(actions: Actions) -> None:
        number = await begun(actions, "slow", text="well")
        await trio.testing.wait_all_tasks_blocked()
        answer = actions.look({"action": number})
        assert answer == {"action": number, "done": False, "doing": "waiting for the test"}
        release.set()
        expected = {"action": number, "done": True, "message": "well"}
        assert await ended(actions, number) == expected

    with_actions(test, slow=slow)


@pytest.mark.parametrize(
    ("error", "text", "exit_code"),
    [
        (UsageError("no such replica"), "no such replica", ExitCode.USAGE),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error", ExitCode.FAILED),
        (ZeroDivisionError(), "internal error, see the log of the daemon", ExitCode.FAILED),
    ],
)
def test_a_failure_is_told_to_who_asks_and_to_nobody_else(
    error: Exception, text: str, exit_code: ExitCode
) -> None:
    async def fail(_: Request, __: Action) -> dict[str, Any]:
        raise error

    async def test(actions: Actions) -> None:
        number = await begun(actions, "fail")
        with pytest.raises(UserError, match=text) as caught:
            await ended(actions, number)
        assert caught.value.exit_code == exit_code
        other = await begun(actions, "echo", text="well")
        assert (await ended(actions, other))["message"] == "well"

    with_actions(test, fail=fail, echo=echo)


@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_an_argument_that_is_none_is_refused(value: object) -> None:
    """Whoever asks may send anything."""

    async def test(actions: Actions) -> None:
        number = await begun(actions, "echo", text=value)
        with pytest.raises(UsageError, match="'text' is to be a text"):
            await ended(actions, number)
        for unknown in (number + 1, -1, "1", None):
            with pytest.raises(UsageError):
                actions.look({"action": unknown})

    with_actions(test, echo=echo)


def test_the_end_of_the_mount_ends_them_and_none_begins_after_it() -> None:
    cancelled: list[str] = []

    async def wait(request: Request, _: Action) -> dict[str, Any]:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(request.text("name"))

    numbers: list[int] = []
    kept: list[Actions] = []

    async def test(actions: Actions) -> None:
        kept.append(actions)
        numbers.append(await begun(actions, "wait", name="one"))
        await trio.testing.wait_all_tasks_blocked()
        await actions.stop()
        numbers.append(await begun(actions, "wait", name="two"))
        await trio.testing.wait_all_tasks_blocked()

    with_actions(test, wait=wait)
    assert cancelled == ["one"]
    for number in numbers:
        with pytest.raises(UserError, match="the mount ended meanwhile"):
            kept[0].look({"action": number})


def test_the_last_ended_ones_are_remembered() -> None:
    async def test(actions: Actions) -> None:
        numbers = [await begun(actions, "echo", text=str(n)) for n in range(KEPT + 10)]
        await ended(actions, numbers[-1])
        await begun(actions, "echo", text="one more")
        with pytest.raises(UsageError, match="it ended long ago"):
            actions.look({"action": numbers[0]})
        assert actions.look({"action": numbers[-1]})["message"] == str(KEPT + 9)

    with_actions(test, echo=echo)
