"""A process that has imported the libraries, and forks a child for every run.

It is itself forked from the test process before the first backward pass of the session: autograd
refuses to work in a fork of a process that used it. One thread before any fork, as data loaders do.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

PATIENCE = 240.0
"""Seconds after which a child counts as hung."""

Work = Callable[[dict[str, Any]], int]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, minus the signal's number where one ended it, and
    everything it said."""

    status: int
    said: str
    seconds: float


class ForkServer:
    """Runs `prepare()` once in a process of its own, then `work(request)` in a child per call.

    Only `os._exit` ends these processes, so nothing of pytest's runs in them.
    """

    def __init__(self, prepare: Callable[[], Work]) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(prepare, requests, answers)
        os.close(requests)
        os.close(answers)
        self._lines = os.fdopen(self._answers, "r", encoding="utf-8")

    def run(self, request: dict[str, Any]) -> Ended:
        """Do `work(request)` in a new child; returns when that one has ended."""
        os.write(self._requests, (json.dumps(request) + "\n").encode())
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the fork server has died")
        return Ended(**json.loads(line))

    def do(self, name: str, *arguments: str) -> None:
        """Call `small_runs.<name>` in the server itself, so that its children need not."""
        os.write(self._requests, (json.dumps({"do": name, "with": arguments}) + "\n").encode())
        assert self._lines.readline().strip() == "{}", "the fork server has died"

    def close(self) -> None:
        """End the server."""
        os.close(self._requests)
        self._lines.close()
        os.waitpid(self._pid, 0)


def _serve(prepare: Callable[[], Work], requests: int, answers: int) -> NoReturn:
    try:
        import torch

        torch.set_num_threads(1)
        work = prepare()
        for line in os.fdopen(requests, "r", encoding="utf-8"):
            request = json.loads(line)
            if "do" in request:
                import small_runs

                getattr(small_runs, request["do"])(*request["with"])
                answer = {}
            else:
                answer = vars(_fork(work, request))
            os.write(answers, (json.dumps(answer) + "\n").encode())
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _fork(work: Work, request: dict[str, Any]) -> Ended:
    began = time.monotonic()
    mouth, ear = os.pipe()[::-1]
    pid = os.fork()
    if pid == 0:
        _child(work, request, mouth)
    os.close(mouth)
    said = b""
    while True:
        left = began + PATIENCE - time.monotonic()
        ready, _, _ = select.select([ear], [], [], max(0.0, left))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            said += b"\nHUNG: killed by the fork server"
            break
        block = os.read(ear, 65536)
        if not block:
            break
        said += block
    os.close(ear)
    _, status = os.waitpid(pid, 0)
    seconds = round(time.monotonic() - began, 3)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"), seconds)


def _child(work: Work, request: dict[str, Any], mouth: int) -> NoReturn:
    # A pipe, not a file: a child whose disk is "full" can still speak.
    os.dup2(mouth, 1)
    os.dup2(mouth, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        status = work(request)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():  # a kill that is still to come
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
