"""Writes a cast member as a character folder in the RoleScape-20 format, with held-out tests.

The layout is that of the published characters (UniCharacter, arXiv 2605.08129): `personalized_data/
{train,test}/<NAME>/` and the reinforcement prompts in `personalized_t2i/<NAME>/`. What is held out:
test pictures show pose-and-place pairs that no training picture, dialogue or prompt has, and test
questions and user lines have phrasings and topics of their own. `<NAME>_attributes.json` holds the
ground truth, so that a judge can score pictures and answers. Rows that others derive from these
files (`processed/`) are not written.

Every part draws from a random stream of its own, so its size changes no other part: a character with
three training pictures has the first three of the ten, and the same tests.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unichar_jax.errors import UserError
from workshop.miniworld import dialogue, profiles, questions, texts
from workshop.miniworld.cast import CAST, Member
from workshop.miniworld.draw import draw
from workshop.miniworld.world import ATTRIBUTES, LOOK_VALUES, SCENE_VALUES, Scene, values

FACT_TOPICS = tuple(profiles.FACT_VALUES)
STYLE_TOPICS = tuple(topic for topic in dialogue.TALK_TOPICS if topic not in FACT_TOPICS)
POLAR_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "accessory_colour")
"""Asked for yes or no about pictures; a question after the accessory's colour would tell the accessory."""
YES_NO_WEIGHT = 0.25
"""Of a yes-or-no question to a drawing of reinforcement learning; the others have 1."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The scenes of a character: pictures for training and testing, and prompts to draw for RL."""

    train: tuple[Scene, ...]
    test: tuple[Scene, ...]
    prompts: tuple[Scene, ...]


def plan_scenes(train: int, test: int, prompts: int, seed: int) -> Plan:
    """Chooses scenes so that test pictures have pose-and-place pairs of their own.

    Every pose and place occurs in training as soon as there are as many pictures. Prompts begin
    with the training pairs and go on to pairs that are in neither split. More pictures of a part
    go on from the fewer, and leave the other parts as they are.

    Raises:
      UserError: more pairs are asked for than there are.
    """
    poses, places = SCENE_VALUES["pose"], SCENE_VALUES["place"]
    pairs = len(poses) * len(places)
    if train < 1 or test < 1 or train + test > pairs:
        raise UserError(
            "miniworld scenes: expected at least one training and one test picture and at most "
            f"{pairs} together, one for each pose and place; got {train} and {test}. Ask for fewer."
        )
    rng = _stream(seed, "pairs")
    pose_order, place_order = rng.permutation(len(poses)), rng.permutation(len(places))
    period = np.lcm(len(poses), len(places))
    # Walking both orders at once visits every pair, and every value as early as possible.
    walk = [
        (poses[pose_order[i % len(poses)]], places[place_order[(i + i // period) % len(places)]])
        for i in range(pairs)
    ]
    allowed = walk[: pairs - test]
    asked = [allowed[i % len(allowed)] for i in range(prompts)]
    return Plan(
        train=_with_moods(walk[:train], seed, "train"),
        test=_with_moods(walk[::-1][:test], seed, "test"),
        prompts=_with_moods(asked, seed, "prompts"),
    )


def _stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one part, whatever the others draw."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))


def _with_moods(pairs: Sequence[tuple[str, str]], seed: int, part: str) -> tuple[Scene, ...]:
    """Scenes from pairs of pose and place, with balanced expressions and times of day."""

    def balanced(name: str) -> list[str]:
        options, rng = SCENE_VALUES[name], _stream(seed, f"{part} {name}")
        rounds = -(-len(pairs) // len(options))
        return [options[i] for _ in range(rounds) for i in rng.permutation(len(options))][: len(pairs)]

    jitter = _stream(seed, f"{part} jitter")
    return tuple(
        Scene(mood, pose, place, time, int(jitter.integers(2**31)))
        for (pose, place), mood, time in zip(pairs, balanced("expression"), balanced("time"), strict=True)
    )


def write_character(
    member: Member,
    root: Path,
    *,
    train_images: int = 10,
    test_images: int = 6,
    rl_prompts: int = 32,
    size: int = 96,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes everything about a cast member under `root`.

    Args:
        member: whom to write.
        root: gets `personalized_data/` and `personalized_t2i/`.
        train_images: training pictures, each with a dialogue.
        test_images: held-out pictures.
        rl_prompts: drawing prompts for reinforcement learning.
        size: picture width and height in pixels.
        seed: chooses scenes and phrasings.
        overwrite: replace folders that exist.

    Returns:
        The training folder, `root/personalized_data/train/<NAME>`.

    Raises:
        UserError: a folder exists and `overwrite` is off, or too many pictures are asked for.
    """
    order = tuple(CAST).index(member.name) if member.name in CAST else len(CAST)
    seed = seed * 1000 + order  # each member has scenes of its own
    plan = plan_scenes(train_images, test_images, rl_prompts, seed)
    targets = {
        "train": root / "personalized_data" / "train" / member.name,
        "test": root / "personalized_data" / "test" / member.name,
        "t2i": root / "personalized_t2i" / member.name,
    }
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{member.name}: expected a free place to write to; got existing {', '.join(existing)}."
            " Choose another folder, or allow overwriting."
        )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as temporary:
        writer = _Writer(member, Path(temporary), size, seed)
        writer.split("train", plan.train)
        writer.split("test", plan.test)
        writer.conversations(plan)
        writer.knowledge()
        writer.profiles()
        writer.prompts(plan)
        for part, target in targets.items():
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / part).rename(target)
    return targets["train"]


class _Writer:
    """Writes the files of one character below a folder, under train/, test/ and t2i/."""

    def __init__(self, member: Member, folder: Path, size: int, seed: int) -> None:
        self.member, self.folder, self.size = member, folder, size
        self.profile, self.name = member.profile, member.name
        self.seed, self.rng = seed, _stream(seed, "")
        self.base_turns: list[list[dict[str, str]]] = []

    def _begin(self, part: str) -> None:
        """From here on texts are drawn from the stream of ``part``."""
        self.rng = _stream(self.seed, f"texts of {part}")

    def _json(self, part: str, kind: str, content: dict[str, Any]) -> None:
        head = {"description": self.member.description, "opening": self.member.opening}
        name = kind if kind == "annotation" else f"{self.name}_{kind}"
        path = self.folder / part / f"{name}.json"
        path.write_text(json.dumps(head | content, ensure_ascii=False, indent=2), encoding="utf-8")

    # -- pictures and what belongs to them ------------------------------------------------------

    def split(self, part: str, scenes: Sequence[Scene]) -> None:
        """Pictures, dialogues, captions, questions and the ground truth of one split."""
        (self.folder / part).mkdir()
        self._begin(part)
        test = part == "test"
        plain, rich, captions, truth = [], [], [], {}
        for index, scene in enumerate(scenes):
            image = str(index)
            picture = draw(self.member.look, scene, self.size)
            Image.fromarray(picture).save(self.folder / part / f"{image}.png", optimize=True)
            spoken = dialogue.scene_exchange(self.profile, scene, self.rng, test=test)
            turns = _turns(spoken, image)
            plain.append(turns)
            more = {
                "thinking_process": dialogue.thinking(self.profile, scene),
                "generation_instruction": dialogue.generation_instruction(self.name, scene),
                "qa_pairs": self._qa_pairs(scene, index, test),
                "mcq_items": self._image_choices(scene, test),
            }
            rich.append([turns[0], turns[1] | more])
            caption = texts.named_caption(self.name, scene, self.rng)
            captions.append({"image_id": image, "t2i_instruction": caption})
            full = texts.full_named_caption(self.name, self.member.look, scene)
            truth[image] = {"scene": dataclasses.asdict(scene), "full_caption": full}
        self._json(part, "annotation", {"scenes": plain})
        self._json(part, "with_image", {"scenes": rich})
        self._json(part, "t2i_instruction", {"t2i_instructions": captions})
        extra = {} if test else {"memorization_answers": self._memorization_answers()}
        self._json(part, "attributes", self._identity() | {"images": truth} | extra)
        if not test:
            self.base_turns = plain

    def _memorization_answers(self) -> dict[str, str]:
        """What a right answer to each question of the memorization test must contain."""
        return {
            question: getattr(self.profile, fact)
            for fact in FACT_TOPICS
            for question in self._held_out((fact,))
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "look": dataclasses.asdict(self.member.look),
            "profile": dataclasses.asdict(self.profile),
            "full_description": self.member.full_description,
        }

    def _qa_pairs(self, scene: Scene, index: int, test: bool) -> list[dict[str, str]]:
        """Who it is, every attribute in every phrasing, and two yes-or-no questions.

        One in ten of RoleScape-20's questions about training pictures is answered with yes or no, the
        others in words. Whether yes is right alternates, so no question has a usual answer.
        """
        truth = values(self.member.look, scene)
        question, answer = questions.identity_question(self.name, test=test)
        pairs = [{"question": question, "answer": answer, "type": "objective"}]
        asked = [
            found
            for name in ATTRIBUTES
            for found in questions.open_questions(truth, name, self.name, test=test)
        ]
        for i in (2 * index, 2 * index + 1):
            name = POLAR_ATTRIBUTES[i % len(POLAR_ATTRIBUTES)]
            asked.append(
                questions.yes_no_question(truth, name, self.name, self.rng, yes=i % 2 == 0, test=test)
            )
        pairs += [
            {
                "question": q.question,
                "answer": questions.sentence(q.answer),
                "type": "subjective" if q.attribute == "expression" else "objective",
            }
            for q in asked
        ]
        return pairs

    def _image_choices(self, scene: Scene, test: bool) -> list[dict[str, Any]]:
        """Five multiple-choice questions with balanced keys."""
        truth = values(self.member.look, scene)
        names = ("pose", "place", "expression", "accessory", "species")
        items = []
        for i, (name, key) in enumerate(zip(names, self._keys(len(names)), strict=True)):
            asked = questions.choice_question(truth, name, self.name, self.rng, key=key, test=test)
            items.append(
                {
                    "id": f"q{i + 1}",
                    "question": asked.question,
                    "options": dict(zip(questions.KEYS, asked.options, strict=True)),
                    "answer_key": asked.key,
                    "difficulty": "easy",
                    "rationale": f"The picture shows it: {asked.answer}.",
                }
            )
        return items

    def _keys(self, count: int) -> list[str]:
        """Answer letters, each as often as any other within one, in random order."""
        start = int(self.rng.integers(4))
        keys = [questions.KEYS[(start + i) % 4] for i in range(count)]
        return [keys[int(i)] for i in self.rng.permutation(count)]

    # -- text ---------------------------------------------------------------------------------

    def conversations(self, plan: Plan) -> None:
        """Dialogues without pictures, and the open questions on memory and personality."""
        self._begin("conversations")
        talk = [
            dialogue.talk_exchange(self.profile, self.rng, topic=topic, variant=variant)
            for topic in dialogue.TALK_TOPICS
            if topic not in dialogue.TEST_ONLY_TOPICS
            for variant in range(4)
            for _ in range(2)
        ]
        asked = [dialogue.scene_exchange(self.profile, scene, self.rng) for scene in plan.prompts]
        scenes = [_turns(exchange) for exchange in _distinct(talk + asked)]
        self._json("train", "dialogue_text_extension_train", {"scenes": scenes + self.base_turns})

        self._begin("held-out conversations")
        test = [
            dialogue.talk_exchange(self.profile, self.rng, topic=topic, variant=0, test=True)
            for topic in dialogue.TALK_TOPICS
        ] + [
            dialogue.scene_exchange(self.profile, scene, self.rng, topic=topic, test=True)
            for scene, topic in zip(plan.test, cycle(("place", "pose and place")), strict=False)
        ]
        scenes = [_turns(exchange) for exchange in _distinct(test)]
        self._json("train", "dialogue_text_extension_test", {"scenes": scenes})

        self._json("train", "memorization_test", {"test_questions": self._held_out(FACT_TOPICS)})
        self._json("train", "personality_test", {"test_questions": self._held_out(STYLE_TOPICS)})

    def _held_out(self, topics: Sequence[str]) -> list[str]:
        """The test phrasings of some topics that the test dialogues leave over."""
        lines = [
            dialogue.user_line(topic, self.profile, None, variant, test=True)
            for topic in topics
            for variant in dialogue.LEFT_OVER
        ]
        return list(dict.fromkeys(lines))

    def knowledge(self) -> None:
        """Questions on facts with answers, and a multiple-choice test of ten."""
        self._begin("knowledge")
        items: list[dict[str, Any]] = []
        for fact in profiles.FACTS:
            answer = profiles.fact_answer(self.profile, fact)
            asked = [
                {"question": question, "answer": answer}
                for question in profiles.fact_questions(self.profile, fact)
            ]
            for said in (self.profile, *profiles.changed(self.profile, fact, self.rng, 1)):
                asked.append(profiles.true_or_not(self.profile, said, fact))
            for pair in asked:
                items.append(
                    {
                        "id": f"qa_{len(items) + 1:03d}",
                        **pair,
                        "evidence": profiles.tell(self.profile, fact),
                        "type": "fact",
                        "difficulty": "easy",
                        "reasoning_steps": [f"The profile tells the {fact}."],
                        "confidence": 1.0,
                    }
                )
        self._json("train", "knowledge_qa", {"qa_items": items})
        self._begin("knowledge test")
        self._json("train", "knowledge_qa_test", {"mcq_items": self._knowledge_choices()})

    def _knowledge_choices(self) -> list[dict[str, Any]]:
        easy, medium = ("job", "home", "food", "hobby"), ("friend", "fear", "secret", "catchphrase")
        hard = ("job", "food")
        asked = [(f, "easy") for f in easy] + [(f, "medium") for f in medium]
        asked += [(f, "hard") for f in hard]
        items = []
        for i, ((fact, level), key) in enumerate(zip(asked, self._keys(10), strict=True)):
            wrong = profiles.changed(self.profile, fact, self.rng, 3)
            if level == "hard":
                question = f"Which sentence about {self.name} and the {fact} is true?"
                options = [profiles.fact_answer(other, fact) for other in wrong]
                right = profiles.fact_answer(self.profile, fact)
            else:
                asked_for = profiles.fact_questions(self.profile, fact, test=True)
                question = texts.pick(self.rng, asked_for)
                options = [getattr(other, fact) for other in wrong]
                right = getattr(self.profile, fact)
            options.insert(questions.KEYS.index(key), right)
            items.append(
                {
                    "id": f"mcq_{i + 1:03d}",
                    "question": question,
                    "options": dict(zip(questions.KEYS, options, strict=True)),
                    "answer_key": key,
                    "difficulty": level,
                    "evidence": profiles.tell(self.profile, fact),
                    "rationale": f"The profile tells the {fact}.",
                }
            )
        return items

    def profiles(self) -> None:
        """The profile as text, full in both splits and simplified for training."""
        for part in ("train", "test"):
            path = self.folder / part / f"{self.name}_full_profile.txt"
            path.write_text(self.member.full_profile, encoding="utf-8")
        path = self.folder / "train" / f"{self.name}_personality_simplified_profile.txt"
        path.write_text(self.member.simplified_profile, encoding="utf-8")

    # -- reinforcement prompts ------------------------------------------------------------------

    def prompts(self, plan: Plan) -> None:
        """Prompts to draw, without and with visual questions, and their ground truth."""
        (self.folder / "t2i").mkdir()
        self._begin("prompts")
        plain: list[dict[str, Any]] = []
        asked, truth, seen = [], {}, set()
        for scene in plan.prompts:
            text = texts.named_caption(self.name, scene, self.rng)
            if text in seen:
                continue
            seen.add(text)
            row = {
                "text": text,
                "character": self.name,
                "scene_id": str(len(plain)),
                "reference_images_path": f"dataset/personalized_t2i/{self.name}",
            }
            truth[row["scene_id"]] = {"scene": dataclasses.asdict(scene)}
            plain.append(row)
            asked.append(row | {"vqa_questions": self._visual_questions(scene)})
        for suffix, rows in (("pure_t2i", plain), ("pure_t2i_with_vqa", asked)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = self.folder / "t2i" / f"{self.name}_{suffix}.jsonl"
            path.write_text(lines, encoding="utf-8")
        profile = self.folder / "t2i" / f"{self.name}_full_profile.txt"
        profile.write_text(self.member.full_profile, encoding="utf-8")
        for index in range(len(plan.train)):
            shutil.copy(self.folder / "train" / f"{index}.png", self.folder / "t2i")
        path = self.folder / "t2i" / f"{self.name}_attributes.json"
        record = self._identity() | {"prompts": truth}
        path.write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _visual_questions(self, scene: Scene) -> list[dict[str, Any]]:
        """Each question once: scene and looks among choices, the scene from two sides, one open.

        RoleScape-20 asks mostly for yes or no. A model as small as the mini base tells choices apart much
        better than it says yes or no, so there are few such questions here, of little weight.
        """
        truth = values(self.member.look, scene)
        who, rng = self.name, self.rng
        asked = [
            questions.choice_question(truth, name, who, rng, key=key)
            for names in (SCENE_VALUES, LOOK_VALUES)
            for name, key in zip(names, self._keys(len(names)), strict=True)
        ]
        for yes in (True, False):
            name = texts.pick(rng, tuple(SCENE_VALUES))
            asked.append(questions.yes_no_question(truth, name, who, rng, yes=yes))
        asked.append(questions.open_question(truth, "expression", who, rng))
        return [_rl_question(question) for question in asked]


def _rl_question(question: questions.Question) -> dict[str, Any]:
    row = {
        "question": question.question,
        "answer": question.answer,
        "type": question.type,
        "category": "scene" if question.attribute in SCENE_VALUES else "character_attributes",
        "weight": YES_NO_WEIGHT if question.type == "yes_no" else 1.0,
        "is_negative": question.negative,
    }
    return row | ({"choices": list(question.options)} if question.options else {})


def _turns(exchange: dialogue.Exchange, image: str | None = None) -> list[dict[str, str]]:
    machine = {"role": "machine", "text": exchange.reply}
    return [
        {"role": "user", "text": exchange.user},
        machine | ({"image": image} if image is not None else {}),
    ]


def _distinct(exchanges: Sequence[dialogue.Exchange]) -> list[dialogue.Exchange]:
    """Each pair of user line and reply once, in order."""
    return list(dict.fromkeys(exchanges))
