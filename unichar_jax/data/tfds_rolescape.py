"""RoleScape-20 as a TFDS dataset, built and read without TensorFlow.

One config per published character (``rolescape20/bo``) and one for all of a source
(``rolescape20/all``); a character of your own needs ``RoleScapeConfig(name, character)``. The source
is a local folder, or by default the Hub dataset ``Tangc03/RoleScape20``, which is downloaded when the
dataset is prepared and never before. Records are ArrayRecord files with random access:

    import tensorflow_datasets as tfds
    from unichar_jax.data.tfds_rolescape import Rolescape20

    Rolescape20(config="bo", source="data/personalized_data").download_and_prepare()
    scenes = tfds.data_source("rolescape20/bo", split="train")

This is the raw annotation for other tools; training prompts are derived by ``tasks.py``, which reads
the folder itself. The pictures show real people and other owners' characters: see the dataset's page
for its terms.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds

from unichar_jax.data.character import Character, ChoiceQuestion, ImageFile, Split
from unichar_jax.data.images import image_header, open_image
from unichar_jax.data.rolescape import find_characters, read_character
from unichar_jax.errors import UserError, did_you_mean

HUB_DATASET = "Tangc03/RoleScape20"
SOURCE_VARIABLE = "UNICHAR_ROLESCAPE_DIR"
"""Environment variable that names the local source, as the argument ``source`` does."""

CHARACTERS = {
    "adrien_brody": "Adrien Brody",
    "bo": "Bo",
    "butin": "Butin",
    "coco": "Coco",
    "friends_chandler": "Friends-Chandler",
    "friends_joey": "Friends-Joey",
    "gao_qiqiang": "Gao Qiqiang",
    "genshin_furina": "Genshin-Furina",
    "harry_potter_hermione": "Harry Potter-Hermione",
    "leonardo": "Leonardo",
    "mahjong_ichihime": "Mahjong Soul-Ichihime",
    "mahjong_miki_nikaidou": "Mahjong Soul-Miki Nikaidou",
    "mahjong_rin_tohsaka": "Mahjong Soul-Rin Tohsaka",
    "mahjong_saber": "Mahjong Soul-Saber",
    "mahjong_yuiyagi": "Mahjong Soul-YuiYagi",
    "mam": "Mam",
    "mydieu": "Mydieu",
    "pokemon_pikachu": "Pokemon-Pikachu",
    "will_in_vietnam": "Will In Vietnam",
    "wukong": "Wukong",
}
"""Published characters: config name and folder name."""

KINDS = (
    "scene",
    "picture",
    "dialogue",
    "knowledge",
    "knowledge_mcq",
    "memorization",
    "personality",
)

_DESCRIPTION = """\
RoleScape-20: twenty characters for customised multimodal role-play, each with about ten pictures.
Split `train`: scenes (an exchange, its picture, a caption, a thought, a drawing instruction, visual
questions), dialogues in text, and questions about facts. Split `test`: scenes with new pictures,
dialogues, multiple-choice questions about facts, and lines that probe memory and personality.
"""

_CITATION = """\
@misc{unicharacter,
  title         = {UniCharacter},
  eprint        = {2605.08129},
  archivePrefix = {arXiv},
}
"""


@dataclasses.dataclass(eq=False)
class RoleScapeConfig(tfds.core.BuilderConfig):
    """A config of the dataset: ``character`` is a folder's name, or empty for all of the source."""

    character: str = ""


class Rolescape20(tfds.core.GeneratorBasedBuilder):
    """Builder of ``rolescape20``; an example is one record of a character, see ``KINDS``."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        RoleScapeConfig(name="all", description="Every character of the source."),
        *(
            RoleScapeConfig(name=name, character=folder, description=f"The character {folder}.")
            for name, folder in CHARACTERS.items()
        ),
    ]

    def __init__(self, *, source: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        """Args are TFDS's own, and ``source``: the folder that holds ``train/`` and ``test/``.

        Without ``source``, the environment variable UNICHAR_ROLESCAPE_DIR is used, else the Hub.
        """
        named = source if source is not None else os.environ.get(SOURCE_VARIABLE)
        self._source = Path(named) if named else None
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text

        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            homepage=f"https://huggingface.co/datasets/{HUB_DATASET}",
            citation=_CITATION,
            supervised_keys=None,
            features=tfds.features.FeaturesDict(
                {
                    "key": text(doc="Unique over all characters, splits and kinds."),
                    "character": text(doc="The character's short name."),
                    "kind": tfds.features.ClassLabel(names=KINDS, doc="What the example is."),
                    "description": text(doc="Who the character is; part of every prompt."),
                    "opening": text(doc="How a conversation opens; often empty."),
                    "pictures": tfds.features.Sequence(
                        tfds.features.Image(shape=(None, None, 3)),
                        doc="One picture for scenes and pictures, else none; RGB, on white.",
                    ),
                    "user": text(doc="What the user says, or the question."),
                    "reply": text(doc="What the character says, or the answer; may be empty."),
                    "caption": text(doc="Plain description of the picture."),
                    "thinking": text(doc="How the character plans the picture."),
                    "generation_instruction": text(doc="One sentence to draw the picture by."),
                    "visual_questions": tfds.features.Sequence(
                        {"question": text(), "answer": text(), "type": text()},
                        doc="Questions about the picture; type is objective or subjective.",
                    ),
                    "choice_questions": tfds.features.Sequence(
                        {"question": text(), "options": text(), "answer_key": text()},
                        doc="Multiple choice; options is one line 'A. text' for each letter.",
                    ),
                }
            ),
        )

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        """TFDS's own, after a look at a local source: faulty data leave no trace in ``data_dir``."""
        if self._source is not None:
            self._verify(self._source)
        super().download_and_prepare(*args, **kwargs)

    def _verify(self, root: Path) -> None:
        """Reads everything once, pixels too: TFDS copies picture files unseen."""
        for folder in self._folders(root):
            for image in read_character(folder).images:
                open_image(image.path)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the Hub's own client downloads, with its own cache and resume
        root = self._source
        if root is None:
            root = self._download()
            self._verify(root)
        return {split: self._generate_examples(root, split) for split in ("train", "test")}

    def _download(self) -> Path:
        """Fetches the raw files from the Hub; the only place that needs a network."""
        import huggingface_hub

        inside = self._character() or "*"
        target = Path(self.data_dir).parents[2] / "downloads" / "rolescape20"
        try:
            huggingface_hub.snapshot_download(
                HUB_DATASET,
                repo_type="dataset",
                local_dir=target,  # real files: the reader follows no link out of a folder
                # wherever the two folders lie in the repository
                allow_patterns=[
                    f"{at}{split}/{inside}/*" for at in ("", "*/") for split in ("train", "test")
                ],
                ignore_patterns=["*/processed/*", "*/prompts/*", "*.DS_Store"],
            )
        except Exception as error:  # the network, the Hub or its client: one remedy serves them all
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"{HUB_DATASET}: the dataset cannot be fetched from the Hub ({reason}). Check the network and try"
                " again, what came so far is kept; or name a folder: unichar data build FOLDER."
            ) from error
        return target

    def _generate_examples(self, root: Path, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        with tempfile.TemporaryDirectory() as scratch:
            for folder in self._folders(root):
                character = read_character(folder)
                for number, example in enumerate(_examples(character, split, Path(scratch))):
                    key = f"{folder.parent.name}/{folder.name}/{example['kind']}/{number}"
                    yield key, _BLANK | _about(character) | example | {"key": key}

    def _character(self) -> str:
        return cast(RoleScapeConfig, self.builder_config).character

    def _folders(self, root: Path) -> Sequence[Path]:
        folders = find_characters(root)
        wanted = self._character()
        names = {folder.name for folder in folders}
        if wanted and wanted not in names:
            raise UserError(
                f"{root}: no character '{wanted}'{did_you_mean(wanted, names)}; "
                f"it has {', '.join(sorted(names))}."
            )
        return [folder for folder in folders if wanted in ("", folder.name)]


_BLANK: dict[str, Any] = {
    **dict.fromkeys(("user", "reply", "caption", "thinking", "generation_instruction"), ""),
    **{name: [] for name in ("pictures", "visual_questions", "choice_questions")},
}


def _about(character: Character) -> dict[str, str]:
    return {
        "character": character.name,
        "description": character.description,
        "opening": character.opening,
    }


def _examples(character: Character, split: Split, scratch: Path) -> Iterator[dict[str, Any]]:
    """What one folder has for a split, without what all records of a character share.

    Pictures belong to their folder's split; a train folder also holds the test questions.
    """
    if character.split == split:
        yield from _pictured(character, scratch)
    if character.split == split == "train":
        for spoken in character.extension_train:
            yield {"kind": "dialogue", "user": spoken.user, "reply": spoken.reply}
        for item in character.knowledge_qa:
            yield {"kind": "knowledge", "user": item.question, "reply": item.answer}
    if split == "test":
        yield from _asked(character)


def _pictured(character: Character, scratch: Path) -> Iterator[dict[str, Any]]:
    captions = {caption.image.id: caption.text for caption in character.captions}
    for scene in character.scenes:
        yield {
            "kind": "scene",
            "pictures": [_picture(scene.image, character, scratch)],
            "user": scene.user,
            "reply": scene.reply,
            "caption": captions.pop(scene.image.id, ""),
            "thinking": scene.thinking,
            "generation_instruction": scene.generation_instruction,
            "visual_questions": [dataclasses.asdict(pair) for pair in scene.qa_pairs],
            "choice_questions": [_choice(item) for item in scene.mcq_items],
        }
    for image in character.images:
        if image.id in captions:
            picture = _picture(image, character, scratch)
            yield {"kind": "picture", "pictures": [picture], "caption": captions[image.id]}


def _asked(character: Character) -> Iterator[dict[str, Any]]:
    for spoken in character.extension_test:
        yield {"kind": "dialogue", "user": spoken.user, "reply": spoken.reply}
    for item in character.knowledge_mcq:
        yield {"kind": "knowledge_mcq", "user": item.question, "choice_questions": [_choice(item)]}
    for question in character.memorization:
        yield {"kind": "memorization", "user": question}
    for question in character.personality:
        yield {"kind": "personality", "user": question}


def _choice(item: ChoiceQuestion) -> dict[str, str]:
    options = "\n".join(f"{letter}. {text}" for letter, text in item.options.items())
    return {"question": item.question, "options": options, "answer_key": item.answer_key}


def _picture(image: ImageFile, character: Character, scratch: Path) -> str:
    """A file that every decoder reads as RGB; TFDS takes paths without importing TensorFlow."""
    if image.mode == "RGB" and image_header(image.path).orientation == 1:
        return str(image.path)
    path = scratch / f"{character.split}-{character.dir_name}-{image.id}.png"
    open_image(image.path).save(path)
    return str(path)
