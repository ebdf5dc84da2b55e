"""Whole numbers in English words, as `num2words` writes them: SmolVLM's video prompts spell a frame count."""

from __future__ import annotations

__all__ = ["number_words"]

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(number: int) -> str:
    """The number as words: 64 is "sixty-four", 128 "one hundred and twenty-eight".

    Args:
        number: 0 to 999.

    Raises:
        ValueError: The number is out of range.
    """
    if not 0 <= number <= 999:
        raise ValueError(f"number is {number}, expected 0 to 999")
    hundreds, rest = divmod(number, 100)
    if hundreds:
        words = f"{_SMALL[hundreds]} hundred"
        return f"{words} and {number_words(rest)}" if rest else words
    if number < len(_SMALL):
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return f"{_TENS[tens - 2]}-{_SMALL[ones]}" if ones else _TENS[tens - 2]
