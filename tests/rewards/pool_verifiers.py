"""Verifiers that misbehave, for worker processes to import."""

import os
import pathlib
import signal
import time

from research.tasks import Unparsed


class Obedient:
    """Does what the answer says."""

    def prepare(self):
        pass

    def __call__(self, problem, answer):
        command, _, argument = answer.partition(" ")
        match command:
            case "right":
                return True
            case "wrong":
                return False
            case "unparsed":
                raise Unparsed(argument)
            case "error":
                raise ValueError(argument)
            case "sleep":
                time.sleep(float(argument))
                return True
            case "power":  # holds the interpreter's lock, deaf to every signal that Python handles
                return 9 ** int(argument) > 0
            case "exit":
                os._exit(int(argument))
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "memory":
                return len(bytearray(int(argument))) > 0
            case "recursion":
                return self(problem, answer)
            case "close":  # the pipe is gone, the process is not
                os.closerange(3, 100)
                time.sleep(60)
            case "pid":
                with pathlib.Path(argument).open("a") as file:
                    file.write(f"{os.getpid()}\n")
                return True
        raise AssertionError(answer)


class Unfit(Obedient):
    def prepare(self):
        raise RuntimeError("no such library here")


class Stillborn(Obedient):
    def prepare(self):
        os.write(2, b"a last word")
        os._exit(3)
