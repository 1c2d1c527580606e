"""The banks that a page serves."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from threading import Lock

from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.reports import printable


class ServedBank:
    """A classifier and the folder that it is saved in.

    Args:
        classifier: as the folder holds it.
        fingerprint: of the folder, from before the classifier was loaded.
    """

    def __init__(self, folder: Path, classifier: DiTiClassifier, fingerprint: str) -> None:
        self.folder, self.classifier = folder.resolve(), classifier
        self.fingerprint = fingerprint

    def check_unchanged(self) -> None:
        """Raises a ValueError where something else has written to the folder since."""
        if bank_fingerprint(self.folder) != self.fingerprint:
            raise ValueError(f"The bank in {self.folder} was changed by another program; start the page again first.")

    def replace(self, classifier: DiTiClassifier) -> None:
        """Uses this classifier from now on, and saves it.

        Raises:
            OSError: it cannot be saved; it is used all the same, and saved together with the next.
        """
        self.classifier = classifier
        classifier.save_pretrained(self.folder)
        self.fingerprint = bank_fingerprint(self.folder)


class Banks:
    """The banks of a page by the names that it shows: those of their folders.

    Args:
        first: the bank that is there when the page opens.
    """

    def __init__(self, first: ServedBank) -> None:
        self._lock = Lock()
        self._banks = {printable(first.folder.resolve().name): first}

    def __getitem__(self, name: str) -> ServedBank:
        """Raises a ValueError where there is no bank of that name."""
        if (found := self._banks.get(name)) is None:
            raise ValueError("The page has no bank of that name; load the page again and choose one.")
        return found

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(self._banks)

    def add(self, bank: ServedBank) -> str:
        """Takes a further bank and returns its name, numbered where another folder has the same."""
        base = printable(bank.folder.name)
        with self._lock:
            names = (base if number == 1 else f"{base} ({number})" for number in count(1))
            name = next(name for name in names if name not in self._banks)
            self._banks[name] = bank
        return name
