"""Words of prompts and captions."""


def generic_prompt(concept: str) -> str:
    """The prompt that names no class, 'a photo of an aircraft'."""
    return f"a photo of {with_article(concept)}"


def with_article(noun: str) -> str:
    """'an aircraft', 'a bird': the noun after its indefinite article, chosen by its first letter."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"
