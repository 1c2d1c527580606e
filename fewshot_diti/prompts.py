"""Words of prompts and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fewshot_diti.config import Label


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The texts that condition the U-Net.

    Attributes:
        template: prompt of a class token, `{}` standing for the class; without `{}` all classes share one prompt.
        generic: prompt of the prior images, and of the U-Net's features.
    """

    template: str
    generic: str

    @classmethod
    def complete(cls, template: str | None, generic: str | None, concept: str | None) -> Self:
        """Those that are given; the others name the concept, and a class token's has the rare word before the class
        (TiF, section 4.1).

        Raises:
            ValueError: one is missing, and there is no concept.
        """
        if concept is None and (template is None or generic is None):
            raise ValueError(
                "What are all classes? Prompts name it: pass concept, such as concept='bird', or prompt_template and "
                "generic_prompt."
            )
        return cls(
            template=template or f"a photo of a hta {{}}, a type of {concept}.",
            generic=generic or generic_prompt(concept or ""),
        )

    def of_class(self, label: Label) -> str:
        """The prompt of a class token."""
        return self.template.replace("{}", str(label))


def generic_prompt(concept: str) -> str:
    """The prompt that names no class, 'a photo of an aircraft'."""
    return f"a photo of {with_article(concept)}"


def with_article(noun: str) -> str:
    """'an aircraft', 'a bird': the noun after its indefinite article, chosen by its first letter."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"
