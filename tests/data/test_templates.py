"""The prompts are an interface: these tests hold them to the letter, written out independently."""

from hypothesis import given
from hypothesis import strategies as st

from unichar_jax.data import templates


def test_dialogue_with_an_empty_opening_keeps_the_trailing_space():
    assert templates.dialogue("Bo", "A bear.", "", "Hi") == (
        "Character Description: A bear.\n\nOpening: \n\nUser Input: Hi\n\nBased on the character "
        "description, opening, conversation history, current user input, and the reference image, "
        "please generate Bo's response."
    )


def test_history_stands_between_opening_and_user_input():
    prompt = templates.dialogue("Bo", "D", "O", "U", [("user", "a"), ("Bo", "b")])
    assert "Opening: O\n\nConversation History:\nuser: a\nBo: b\n\nUser Input: U\n\n" in prompt


def test_picture_prompts():
    head = "Character Description: D\n\nUser Input: U\n\nCharacter Response: R\n\n"
    close = (
        "Please generate an image that visualizes this scene with the character responding to the "
        "user's input based on the character description"
    )
    assert templates.t2i("D", "U", "R") == f"{head}{close}."
    assert templates.t2i_with_thinking("D", "U", "R", "T", "G") == (
        f"{head}Thinking Process: T\n\nGeneration Instruction: G\n\n{close}, thinking process, and "
        "generation instruction."
    )


def test_thinking_prompts_order_their_instruction_differently():
    trained = templates.thinking_prompt("D", "U", "R")
    shipped = templates.thinking_prompt_as_shipped("D", "U", "R")
    assert trained.startswith("Character Description: D\n\n")
    assert trained.endswith("</think>\n<gen>...your generation instruction...</gen>\n")
    assert shipped.startswith("You should first think about the planning process")
    assert shipped.endswith(
        "</gen>\n\n\nCharacter Description: D\n\nUser Input: U\n\n"
        "Character Response: R\n\nPlease think about how to generate an image "
        "for this scene."
    )


def test_system_prompts_keep_the_space_before_their_line_break():
    for prompt in (templates.VLM_THINK, templates.GEN_THINK):
        first, second = prompt.split("\n")
        assert first.endswith(". ") and second.startswith("The ") and second.endswith(" here")


def test_vqa_has_no_separator():
    assert templates.vqa("Where?") == "<image>Where?"


_FIELD = st.text().filter(lambda s: "<" not in s)


@given(_FIELD, _FIELD)
def test_parse_is_the_inverse_of_the_reply(thinking, instruction):
    parsed = templates.parse_thinking(templates.thinking_reply(thinking, instruction))
    assert parsed == (thinking.strip(), instruction.strip())


def test_parse_of_partial_replies():
    assert templates.parse_thinking("no tags") == ("", "")
    assert templates.parse_thinking("<think>a\nb</think>") == ("a\nb", "")
    assert templates.parse_thinking("<gen>x</gen><gen>y</gen><think>unclosed") == ("", "x")
