"""Words of prompts and captions."""


def with_article(noun: str) -> str:
    """'an aircraft', 'a bird': the noun after its indefinite article, chosen by its first letter."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"
