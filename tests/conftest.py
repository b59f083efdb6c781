"""Fixtures that several parts of the test-suite share: the real data where it is, a tiny character."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import pytest
from PIL import Image, ImageDraw

# Eight simulated devices for the sharding tests; set before anything touches a device.
jax.config.update("jax_num_cpu_devices", 8)
# On few cores they wait long for each other, and XLA would abort the whole process after 40 seconds of that.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# Where the CUDA compiler is installed without CUDA's libraries, it is not to be refused for that.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

REPOSITORY = Path(__file__).resolve().parents[1]

# Many tests compile the same small programs; the cache is shared by the workers of a run and by later runs.
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".pytest_cache" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def rolescape_dir() -> Path:
    """The folder that holds ``personalized_data/`` and ``personalized_t2i/`` of RoleScape-20.

    Its pictures never enter the repository: set UNICHAR_ROLESCAPE_DIR, or put the folder beside it.
    """
    named = os.environ.get("UNICHAR_ROLESCAPE_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "rolescape"
    if not (folder / "personalized_data").is_dir():
        pytest.skip(f"RoleScape-20 is not at {folder}; set UNICHAR_ROLESCAPE_DIR to test with it")
    return folder


def draw_picture(path: Path, shade: int, size: tuple[int, int] = (40, 32)) -> None:
    """A small picture with some structure; odd shades are partly transparent."""
    mode = "RGBA" if shade % 2 else "RGB"
    image = Image.new(mode, size, (255, 255, 255, 0)[: len(mode)])
    ImageDraw.Draw(image).ellipse((4, 4, 28, 28), fill=(40 * shade % 256, 90, 160, 255)[: len(mode)])
    image.save(path)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _choice(number: int) -> dict[str, object]:
    return {
        "id": f"mcq_{number:03d}",
        "question": f"Question {number}?",
        "options": {"A": "one", "B": "two", "C": "three", "D": "four"},
        "answer_key": "ABCD"[number % 4],
        "difficulty": "easy",
        "rationale": "because",
    }


def write_tiny_character(folder: Path, scenes: int) -> None:
    """A complete character ``Tess`` in the format of RoleScape-20, small and drawn here."""
    folder.mkdir(parents=True)
    meta = {"description": "Tess is a blue circle — calm, round.", "opening": "Hello, I roll."}
    turns = [
        [
            {"role": "user", "text": f"What do you do at {i} o'clock?"},
            {"role": "machine", "text": f"At {i} I roll “gently”.", "image": str(i)},
        ]
        for i in range(scenes)
    ]
    write_json(folder / "annotation.json", meta | {"scenes": turns})
    rich = json.loads(json.dumps(turns))
    for i, (_, machine) in enumerate(rich):
        draw_picture(folder / f"{i}.png", i if folder.parent.name == "train" else i + 10)
        machine["thinking_process"] = f"Tess shows that it is {i}."
        machine["generation_instruction"] = f"A blue circle, {i} o'clock."
        if folder.parent.name == "train":
            machine["qa_pairs"] = [
                {"question": f"Colour {q}?", "answer": "Blue.", "type": "objective"} for q in range(2)
            ]
            machine["mcq_items"] = [_choice(q) for q in range(2)]
    write_json(folder / "Tess_with_image.json", meta | {"scenes": rich})
    captions = [{"image_id": str(i), "t2i_instruction": f"Tess, number {i}"} for i in range(scenes)]
    write_json(folder / "Tess_t2i_instruction.json", meta | {"t2i_instructions": captions})
    if folder.parent.name == "test":
        return
    spoken = [
        [
            {"role": "user", "text": f"Hi {i}"},
            {"role": "machine", "text": f"Hello {i}", "image": "9"},
        ]
        for i in range(3)
    ]
    write_json(folder / "Tess_dialogue_text_extension_train.json", meta | {"scenes": spoken + turns})
    write_json(folder / "Tess_dialogue_text_extension_test.json", meta | {"scenes": spoken[:2]})
    items = [
        {
            "id": f"qa_{i:03d}",
            "question": f"Fact {i}?",
            "answer": f"Answer {i}",
            "evidence": "profile",
            "type": "fact",
            "difficulty": "easy",
            "reasoning_steps": ["look"],
            "confidence": 0.9,
        }
        for i in range(4)
    ]
    write_json(folder / "Tess_knowledge_qa.json", meta | {"qa_items": items})
    choices = [_choice(i) | {"evidence": "profile"} for i in range(3)]
    write_json(folder / "Tess_knowledge_qa_test.json", meta | {"mcq_items": choices})
    write_json(folder / "Tess_memorization_test.json", meta | {"test_questions": ["Where are you?"]})
    write_json(folder / "Tess_personality_test.json", meta | {"test_questions": ['"Who?"', 'Say "no" now']})
    (folder / "Tess_full_profile.txt").write_text("Tess is a circle.", encoding="utf-8")
    (folder / "Tess_personality_simplified_profile.txt").write_text("Calm.", encoding="utf-8")


@pytest.fixture(scope="session")
def _tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "personalized_data"
    write_tiny_character(root / "train" / "Friends-Tess", 4)
    write_tiny_character(root / "test" / "Friends-Tess", 2)
    return root


@pytest.fixture
def tiny_root(_tiny_template: Path, tmp_path: Path) -> Path:
    """A fresh copy of a root with one complete small character, ``Friends-Tess``, to read or spoil."""
    return shutil.copytree(_tiny_template, tmp_path / "personalized_data")
