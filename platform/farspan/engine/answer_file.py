"""The file that answers are appended to, and what it says of an earlier run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path

from farspan.engine.prompts import Answered, Question
from farspan.errors import ConfigError, CorruptDataError, EngineError
from farspan.storage.local import WRITING, sync_path


class AnswerFile:
    """Answers that are there already, and new ones appended; one process at a time writes."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            EngineError: somebody else writes it.
            CorruptDataError: it holds something else than answers. A last line that was torn is dropped.
        """
        # What a link points to is replaced, not the link.
        self._path = path.resolve()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, str] = {}
        """Id -> digest of what was asked; empty: it does not say. Lines with an error are asked again."""
        self._file = _locked(self._path)
        try:
            if self._read():
                self._leave_out_errors()
        except BaseException:
            self._file.close()
            raise

    def check(self, questions: Iterable[Question | Answered]) -> int:
        """How many of them are answered here.

        Raises ConfigError where an answer is to something else than its line asks now, or to no line at all.
        """
        num_found = 0
        for question in questions:
            if not isinstance(question, Question) or question.id not in self.done:
                continue
            asked = self.done[question.id]
            if not asked:
                raise self._foreign(f"{question.id!r} does not say what it was asked: an older version answered it")
            if asked != question.asked:
                raise self._foreign(f"{question.id!r} was asked with another model, other options or another prompt")
            num_found += 1
        if num_found < len(self.done):
            raise self._foreign(f"{len(self.done) - num_found} of its answers are to no line of the prompts")
        return num_found

    def append(self, answers: Iterable[Answered]) -> None:
        """Written through to the operating system: a process that dies loses nothing of it."""
        for answer in answers:
            self._file.write(answer.to_json().encode() + b"\n")
            if answer.id is not None and answer.error is None:
                self.done[answer.id] = answer.asked
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _read(self) -> bool:
        """Whether there are errors among the answers."""
        whole, failed = 0, False
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    name, _ = record["id"], record["line"]
                    if "error" in record:
                        failed = True
                    else:
                        self.done[name] = record.get("asked", "")
                except (ValueError, KeyError, TypeError):
                    raise CorruptDataError(f"{self._path}:{number}", "is no answer; choose another output") from None
                whole += len(raw)
        self._file.truncate(whole)
        return failed

    def _leave_out_errors(self) -> None:
        """Put a file without them into the place of this one: readers see the old one or the new one, whole."""
        fresh = self._path.with_name(f"{WRITING}{self._path.name}")
        with self._path.open("rb") as old, fresh.open("wb") as new:
            shutil.copymode(self._path, fresh)
            new.writelines(raw for raw in old if "error" not in json.loads(raw))
        sync_path(fresh)
        # Before anybody else can find it.
        file = _locked(fresh)
        os.replace(fresh, self._path)
        sync_path(self._path.parent)
        self._file.close()
        self._file = file

    def _foreign(self, reason: str) -> ConfigError:
        return ConfigError(
            "output",
            f"must hold answers of this model, these options and these prompts, but {reason}",
            str(self._path),
            "choose another file, or remove this one",
        )


def _locked(path: Path) -> BufferedWriter:
    """The file of that name, for this process alone."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have put a new file in its place meanwhile.
        ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        ours = False
    if not ours:
        file.close()
        raise EngineError(f"{path} is being written by another process; wait for it, or choose another")
    return file
