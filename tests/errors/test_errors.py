"""What libraries raise becomes one sentence; what is no fault of a file does not."""

import pytest

from ep_export.errors import UsageError, UserError, as_user_error, reason


def raised(error):
    with as_user_error("photo.png is damaged", hint="give another"):
        raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("data did not match\n  any variant"), "data did not match any variant"),
        (KeyError("size"), "KeyError 'size'"),
        (IndexError("list index out of range"), "IndexError list index out of range"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
        (TimeoutError("slow"), "slow"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_exception_of_a_library_is_a_sentence(error, said):
    with pytest.raises(UserError) as caught:
        raised(error)
    assert str(caught.value) == f"photo.png is damaged: {said}"
    assert caught.value.hint == "give another"
    assert caught.value.__cause__ is error


def test_a_panic_in_rust_is_one_too():
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # noqa: S106 - not a password
    tokenizer.post_processor = processors.TemplateProcessing(single="[X] $A", special_tokens=[("[X]", 1)])
    broken = Tokenizer.from_str(tokenizer.to_str().replace('"[X]":{', '"[Y]":{'))
    with (
        pytest.raises(UserError, match="no entry found"),
        as_user_error("tokenizer.json fails", hint="fetch it"),
    ):
        broken.encode("a")


@pytest.mark.parametrize("error", [UserError("mine", hint="h"), UsageError("mine"), MemoryError()])
def test_sentences_and_a_lack_of_memory_pass(error):
    with pytest.raises(type(error)) as caught:
        raised(error)
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_passes(error):
    with pytest.raises(error):
        raised(error())


def test_a_reason_is_one_line_and_short():
    said = reason(ValueError("a\nb\t c" + "x" * 1000))
    assert said.startswith("a b c")
    assert len(said) < 310
